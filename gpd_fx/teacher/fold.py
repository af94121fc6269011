"""`fold`: the trained student as a plain module (channel-branch reparameterization)."""

from __future__ import annotations

import copy

import torch
from torch import nn

from gpd_fx.errors import FoldError
from gpd_fx.fxtools.module_calls import detached_copies
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher


def fold(teacher: nn.Module) -> nn.Module:
    """The trained student: a module of the given model's class, with its `state_dict` keys and shapes.

    Args:
        teacher: what `gpd_fx.expand` returned, trained or not; wrapped by `torch.compile` or DistributedDataParallel or
            not. It is not changed.

    Returns:
        A new module in the teacher's mode. Its parameters are the student's slices of the merged kernels, its buffers
        are the student's own.

    Raises:
        FoldError: the argument is no dynamic teacher.
    """
    given = teacher
    while not isinstance(teacher, DynamicTeacher):
        inner = getattr(teacher, "_orig_mod", None) or getattr(teacher, "module", None)
        if not isinstance(inner, nn.Module):
            raise FoldError(f"cannot fold a {type(given).__name__}; pass what gpd_fx.expand or gpd_fx.load returned")
        teacher = inner
    student = copy.deepcopy(teacher.skeleton, detached_copies(teacher.skeleton))
    with torch.no_grad():
        tensors = teacher.composition.student()
    made = {n: nn.Parameter(t.detach().clone(), requires_grad=teacher.trainable[n]) for n, t in tensors.items()}
    for alias, name in teacher.aliases.items():
        if name in made:
            owner, _, leaf = alias.rpartition(".")
            setattr(student.get_submodule(owner), leaf, made[name])
    return student
