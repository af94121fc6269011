"""The trainer behind `gpd-fx distill`."""

from gpd_fx.distill.config import DistillConfig as DistillConfig
from gpd_fx.distill.config import load_config as load_config
from gpd_fx.distill.data import Images as Images
from gpd_fx.distill.run import Results as Results
from gpd_fx.distill.run import distill as distill
