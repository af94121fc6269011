"""gpd_fx: any PyTorch model becomes a wider dynamic teacher that shares its parameters, and a plain student again.

`expand` rewrites a model into a multi-branch dynamic teacher that computes exactly the same function; the two are
trained together (Gap Preserving Distillation); `fold` takes the student out; `export_onnx` ships it.
"""

from gpd_fx import passes as passes
from gpd_fx.api.checkpoint import load as load
from gpd_fx.api.checkpoint import save as save
from gpd_fx.api.expansion import expand as expand
from gpd_fx.api.expansion import inspect_model as inspect_model
from gpd_fx.api.export import OnnxReport as OnnxReport
from gpd_fx.api.export import export_onnx as export_onnx
from gpd_fx.api.growth import grow as grow
from gpd_fx.capture.capture import capture as capture
from gpd_fx.composition.branches import register_branch as register_branch
from gpd_fx.errors import ArgumentError as ArgumentError
from gpd_fx.errors import CaptureError as CaptureError
from gpd_fx.errors import CheckpointError as CheckpointError
from gpd_fx.errors import ExportError as ExportError
from gpd_fx.errors import FoldError as FoldError
from gpd_fx.errors import GPDError as GPDError
from gpd_fx.errors import GPDWarning as GPDWarning
from gpd_fx.errors import InputError as InputError
from gpd_fx.errors import PassError as PassError
from gpd_fx.errors import TrainingError as TrainingError
from gpd_fx.errors import VerificationError as VerificationError
from gpd_fx.losses import GPDLoss as GPDLoss
from gpd_fx.losses import GPDLosses as GPDLosses
from gpd_fx.report.expansion_report import ExpansionReport as ExpansionReport
from gpd_fx.rules.registration import register_rule as register_rule
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher as DynamicTeacher
from gpd_fx.teacher.fold import fold as fold
from gpd_fx.verify.verification import verify as verify
from gpd_fx.version import __version__ as __version__
