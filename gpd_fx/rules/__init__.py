"""Rules: what each op does to axes, and what widening does to the op."""

from gpd_fx.rules.entry import Entry as Entry
from gpd_fx.rules.entry import Kernel as Kernel
from gpd_fx.rules.entry import Randomness as Randomness
from gpd_fx.rules.site import Axes as Axes
from gpd_fx.rules.site import Rule as Rule
from gpd_fx.rules.site import Site as Site
from gpd_fx.rules.site import Value as Value
from gpd_fx.rules.table import RULES as RULES
from gpd_fx.rules.table import rule_of as rule_of
