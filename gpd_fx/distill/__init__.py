"""The trainer: `gpd-fx distill`, and the same from Python."""

from gpd_fx.distill.config import DistillConfig as DistillConfig
from gpd_fx.distill.config import load_config as load_config
from gpd_fx.distill.data.images import Images as Images
from gpd_fx.distill.in_place import fit as fit
from gpd_fx.distill.loop.evaluation import Score as Score
from gpd_fx.distill.run import Results as Results
from gpd_fx.distill.run import distill as distill
from gpd_fx.distill.show.callbacks import Epoch as Epoch
