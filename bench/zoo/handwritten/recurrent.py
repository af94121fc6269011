"""Steps in time: torch's own recurrent layers, a loop that capture unrolls, scans."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.entry import Entry, normal, tokens


class Recurrent(nn.Module):
    """A recurrent layer between convs."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.enter = nn.Conv1d(3, 10, 3)
        self.core = kind(10, 8, batch_first=True)
        self.leave = nn.Conv1d(8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enter(x))
        return self.leave(self.core(x.transpose(1, 2))[0].transpose(1, 2))


class Unrolled(nn.Module):
    """A gated cell, written out, that runs over time in a loop; the state begins as zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(17, 6)
        self.gates = nn.Linear(6 + 9, 18)
        self.new = nn.Linear(6 + 9, 9)
        self.leave = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        words = self.words(x)
        state = words.new_zeros(words.shape[0], 9)
        states: list[Tensor] = []
        for word in words.unbind(1):
            update, reset = torch.sigmoid(self.gates(torch.hstack([word, state]))).tensor_split(2, -1)
            new = torch.tanh(self.new(torch.concat([word, reset * state], -1)))
            state = torch.lerp(state, new, update)
            states.append(state)
        return self.leave(torch.stack(states, 1))


class Twice(nn.Module):
    """One block used twice, and one whose weight serves as its own transpose on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 9)
        self.block = nn.Sequential(nn.LayerNorm(9), nn.Linear(9, 14), nn.GELU(), nn.Linear(14, 9))
        self.hidden = nn.Linear(9, 7)
        self.leave = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for _ in range(2):
            x = x + self.block(x)
        return self.leave(F.linear(F.relu(self.hidden(x)), self.hidden.weight.t()))


class StateSpace(nn.Module):
    """A diagonal state space: scans over time of many channels."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 10)
        self.decay = nn.Parameter(torch.zeros(10))
        self.mix = nn.Linear(10, 10)
        self.leave = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        decay = torch.sigmoid(self.decay + x)
        log_decay = torch.cumsum(decay.log(), 1)
        y = torch.cumsum(x * torch.exp(-log_decay), 1) * torch.exp(log_decay) + torch.cumprod(decay, 1)
        y = y + torch.logcumsumexp(x, 1) + torch.cummax(x, 1)[0] - torch.cummin(x, 1)[0]
        return self.leave(self.mix(y) + decay.prod(1, keepdim=True))


class DeltaRule(nn.Module):
    """Fast weights: outer products of keys and values are summed up over time, queries read them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 8)
        self.qkv = nn.Linear(8, 18)
        self.leave = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(F.silu(self.enter(x))).chunk(3, -1)
        memory = torch.zeros_like(k[:, 0, :, None] * v[:, 0, None, :])
        outputs: list[Tensor] = []
        for t in range(x.shape[1]):
            key, value, query = (part.select(1, t) for part in (k, v, q))
            memory = 0.9 * memory + key.unsqueeze(2) * value.unsqueeze(1)
            outputs.append(torch.bmm(query.unsqueeze(1), memory).squeeze(1))
        return self.leave(torch.stack(outputs, 1))


MODELS: dict[str, Entry] = {
    "lstm": Entry(lambda: Recurrent(nn.LSTM), normal((3, 9))),
    "gru": Entry(lambda: Recurrent(nn.GRU), normal((3, 9))),
    "rnn": Entry(lambda: Recurrent(nn.RNN), normal((3, 9))),
    "rnn_relu": Entry(lambda: Recurrent(partial(nn.RNN, nonlinearity="relu")), normal((3, 9))),
    "unrolled": Entry(Unrolled, tokens(17, (5,))),
    "twice": Entry(Twice, normal((5,))),
    "state_space": Entry(StateSpace, normal((7, 4))),
    "delta_rule": Entry(DeltaRule, normal((5, 4))),
}
