"""Every error that gpd_fx raises on purpose.

Each message names the argument, parameter or graph node, the offending value, and the remedy.
"""


class GPDError(Exception):
    """Base of every error raised by gpd_fx."""


class ArgumentError(GPDError, ValueError):
    """An argument has a value that cannot work (ratio, branch name, glob, path, ...)."""


class InputError(GPDError, ValueError):
    """Example inputs are missing, cannot be inferred, or do not fit the model."""


class CaptureError(GPDError, RuntimeError):
    """`torch.export` cannot capture the model; the message says where and what to change."""


class PassError(GPDError, RuntimeError):
    """A pass found its pre- or postcondition violated; the message names the pass and the node."""


class VerificationError(GPDError, RuntimeError):
    """A transformed model differs from its source; the message names the first node that differs."""


class FoldError(GPDError, ValueError):
    """The object cannot be folded into a student."""


class ExportError(GPDError, RuntimeError):
    """ONNX export failed, or ONNX Runtime disagrees with the student."""


class CheckpointError(GPDError, ValueError):
    """A file is not a readable gpd_fx checkpoint, or belongs to another model."""


class TrainingError(GPDError, RuntimeError):
    """Training cannot go on; the message names the epoch, the step and the loss."""


class GPDWarning(UserWarning):
    """Something worth knowing that is no error, such as a model in which nothing widens."""
