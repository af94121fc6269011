"""The passes Branch and Merge on captured models."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from gpd_fx.composition.composition import Composition
from gpd_fx.errors import ArgumentError, PassError
from gpd_fx.passes.branch import Branch
from gpd_fx.passes.merge import Merge
from gpd_fx.passes.pipeline import Pipeline

# torch 2.11's own code, when it copies a captured graph
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

Randomise = Callable[[nn.Module], nn.Module]


class Net(nn.Module):
    """Convs of every kind, with padding modes and strides, residual sums and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, (3, 5), stride=2, padding=(1, 2), padding_mode="reflect")
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 5, padding="same", groups=6, bias=False)
        self.grouped = nn.Conv2d(6, 6, 2, padding=1, dilation=2, groups=3)
        self.point = nn.Conv2d(6, 6, 1, bias=False)
        self.up = nn.ConvTranspose2d(6, 5, 4, stride=2, padding=1, output_padding=1)
        self.sequence = nn.Conv1d(5, 4, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = functional.relu(self.norm(self.stem(x)))
        x = x + self.point(self.depthwise(x))
        x = self.up(functional.silu(self.grouped(x)))
        x = self.sequence(x.flatten(2))
        return {"logits": self.head(x.mean(2)), "features": x}


class Tied(nn.Module):
    """A weight used as an embedding and as the output layer, and one linear layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(self.mix(self.embedding(x)).relu()))


def capture(model: nn.Module, x: Tensor) -> fx.GraphModule:
    exported = torch.export.export(model, (x,), strict=False).module()
    assert isinstance(exported, fx.GraphModule)
    return exported


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 11, 10, dtype=torch.float64)


@pytest.fixture
def graph(randomise: Randomise, image: Tensor) -> fx.GraphModule:
    return capture(randomise(Net().double().eval()), image)


def composition_of(module: fx.GraphModule) -> Composition:
    composition = module.get_submodule("composition")
    assert isinstance(composition, Composition)
    return composition


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key] - tensor).abs().max() <= 1e-12 * tensor.abs().max()


def count(module: fx.GraphModule, op: str, target: object = None) -> int:
    return sum(node.op == op and target in (None, node.target) for node in module.graph.nodes)


def test_branch_changes_nothing_at_the_start(graph: fx.GraphModule, image: Tensor) -> None:
    keys = list(graph.state_dict())
    before = graph.code
    result = Branch()(graph)
    assert result.modified
    assert all(torch.equal(tensor, graph(image)[key]) for key, tensor in result.graph_module(image).items())
    assert graph.code == before  # the given module is left as it was
    assert list(graph.state_dict()) == keys
    names = {name for name, _ in result.graph_module.named_parameters()}
    assert {f"composition.weights.{layer}.weight" for layer in ("stem", "depthwise", "head")} <= names
    assert "composition.branches.up.weight.b1x1_kxk.kernel" in names
    assert "stem.weight" not in names
    assert "stem.bias" in names


def test_branch_inserts_one_call_and_a_getitem_a_weight(graph: fx.GraphModule) -> None:
    module = Branch()(graph).graph_module
    calls = list(module.graph.find_nodes(op="call_module", target="composition"))
    assert len(calls) == 1
    assert count(module, "call_function", operator.getitem) == 1 + 7
    assert count(module, "get_attr") == count(graph, "get_attr") - 7


def test_branch_then_merge_is_the_identity(graph: fx.GraphModule, image: Tensor) -> None:
    result = Pipeline((Branch(), Merge()))(graph)
    assert all(torch.equal(tensor, graph(image)[key]) for key, tensor in result.graph_module(image).items())
    assert list(result.graph_module.state_dict()) == list(graph.state_dict())
    assert all(torch.equal(t, graph.state_dict()[key]) for key, t in result.graph_module.state_dict().items())
    assert sorted(str(n.target) for n in result.graph_module.graph.nodes) == sorted(
        str(n.target) for n in graph.graph.nodes
    )
    Net().double().load_state_dict(result.graph_module.state_dict(), strict=True)


@pytest.mark.parametrize("branches", ["orepa", ["1xk+kx1", "1x1-kxk:3", "lowrank:2"]])
def test_merge_is_exact_with_trained_branches(
    graph: fx.GraphModule, image: Tensor, branches: str | list[str], randomise: Randomise
) -> None:
    module = Branch(branches)(graph).graph_module
    randomise(composition_of(module))
    expected = module(image)
    assert (expected["features"] - graph(image)["features"]).abs().max() > 0.1
    merged = Merge()(module)
    assert merged.modified
    close(merged.graph_module(image), expected)
    close(module(image), expected)  # the given module still has its branches
    assert composition_of(module)
    assert not hasattr(merged.graph_module, "composition")


def test_branches_train(graph: fx.GraphModule, image: Tensor) -> None:
    module = Branch()(graph).graph_module
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        module(image)["logits"].square().sum().backward()
        optimizer.step()
    moved = [p for p in composition_of(module).branches.parameters() if p.grad is not None and p.grad.any()]
    assert len(moved) == len(list(composition_of(module).branches.parameters()))
    close(Merge()(module).graph_module(image), module(image))


def test_tied_weights_stay_tied() -> None:
    x = torch.randint(7, (2, 5))
    graph = capture(Tied().double(), x)
    module = Branch("lowrank:2")(graph).graph_module
    composition = composition_of(module)
    assert len(composition.plans) == 2
    for p in composition.parameters():
        nn.init.normal_(p)
    merged = Merge()(module).graph_module
    torch.testing.assert_close(merged(x), module(x), rtol=1e-12, atol=1e-12)
    assert merged.get_parameter("embedding.weight") is merged.get_parameter("out.weight")
    assert list(merged.state_dict()) == list(graph.state_dict())


def test_frozen_weights_get_no_branches_and_stay_frozen(graph: fx.GraphModule, image: Tensor) -> None:
    graph.get_parameter("stem.weight").requires_grad_(False)
    result = Branch()(graph)
    assert composition_of(result.graph_module).branch_names("stem.weight") == ("kxk",)
    assert any(note.startswith("stem.weight: 1x1 left out, the weight is frozen") for note in result.notes)
    merged = Merge()(result.graph_module).graph_module
    assert not merged.get_parameter("stem.weight").requires_grad
    assert merged.get_parameter("up.weight").requires_grad


@pytest.mark.parametrize("branches", [None, [], "kxk"])
def test_no_branches_asked_for(graph: fx.GraphModule, branches: list[str] | None) -> None:
    result = Branch(branches)(graph)
    assert not result.modified
    assert result.graph_module is graph


def test_a_graph_without_weights(image: Tensor) -> None:
    result = Branch()(capture(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).double().eval(), image))
    assert not result.modified
    assert result.notes[0].startswith("no conv or linear op uses a parameter as its weight; saw 1 ")


def test_merge_of_a_plain_graph(graph: fx.GraphModule) -> None:
    result = Merge()(graph)
    assert not result.modified
    assert result.graph_module is graph


def test_branch_twice_is_refused(graph: fx.GraphModule) -> None:
    with pytest.raises(PassError, match=r"pass Branch.*has branches already; run the pass Merge first"):
        Pipeline((Branch(), Branch()))(graph)


def test_unknown_branch(graph: fx.GraphModule) -> None:
    with pytest.raises(ArgumentError, match="no branch 'dwsepp'; did you mean 'dwsep'"):
        Branch(["dwsepp"])(graph)


def test_a_model_with_its_own_composition_is_refused() -> None:
    model = nn.Sequential()
    model.add_module("composition", nn.Conv2d(3, 3, 1))
    with pytest.raises(PassError, match="attribute `composition`"):
        Branch()(fx.symbolic_trace(model))


def test_merge_refuses_a_graph_of_both_networks(graph: fx.GraphModule) -> None:
    module = Branch()(graph).graph_module
    node = next(iter(module.graph.find_nodes(op="call_module", target="composition")))
    with module.graph.inserting_after(node):
        student = module.graph.call_function(operator.getitem, (node, 1))
    output = module.graph.output_node()
    output.args = ((*output.all_input_nodes, student),)
    with pytest.raises(PassError, match="takes more than the teacher's tensors"):
        Merge()(module)


def test_seed_and_order(graph: fx.GraphModule) -> None:
    first, again, other = (Branch(seed=seed)(graph).graph_module.state_dict() for seed in (1, 1, 2))
    key = "composition.branches.stem.weight.dwsep.point"
    assert torch.equal(first[key], again[key])
    assert not torch.equal(first[key], other[key])
