"""Head.of on two processes: the DTensor of a sharded head is read for what it is, and trains as the model's own does.

FSDP2: the ranks have their own sequences; two steps of fastpost's loss and of the model's own logits under the same
wrapping have the same gradients. Tensor parallel: the ranks have the same ones; the gradients are those of one process.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import fastpost as fp
import tiny
from fastpost.integrations.transformers import fuse_head
from fastpost.models.probe import check_head
from ranks import RANKS, two_processes

pytestmark = pytest.mark.slow

Gradients = dict[str, Tensor]
IDS = (torch.arange(2 * RANKS * 9).view(2 * RANKS, 9) * 7 + 3) % 97  # two sequences for each rank
WAYS = ("logits", "head", "fused")
ADAPTER_WAYS = (*WAYS, "fused first")  # before FSDP2 wraps it


def inputs(rank: int | None = None) -> tuple[Tensor, Tensor]:
    """(input_ids, labels) of a rank, or of all."""
    ids = IDS if rank is None else IDS[2 * rank : 2 * rank + 2]
    return ids, ids.masked_fill(torch.arange(9) < 3, -100)


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(model: nn.Module) -> Gradients:
    return {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def lm(tied: str) -> Any:
    return tiny.model(tie_word_embeddings=tied == "tied", num_hidden_layers=1).double()


# ---- FSDP2 ----


def root(model: Any, mesh: DeviceMesh | None) -> None:
    fully_shard(model.model.layers[0], mesh=mesh)
    fully_shard(model, mesh=mesh)


def root_resharded(model: Any, mesh: DeviceMesh | None) -> None:
    fully_shard(model.model.layers[0], mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def head_apart(model: Any, mesh: DeviceMesh | None) -> None:
    fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=True)
    root(model, mesh)


def norm_and_head(model: Any, mesh: DeviceMesh | None) -> None:
    fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    root(model, mesh)


WRAPPINGS = {f.__name__: f for f in (root, root_resharded, head_apart, norm_and_head)}
MESHES: dict[str, Callable[[], DeviceMesh | None]] = {
    "no mesh": lambda: None,
    "dp_shard": lambda: dist.init_device_mesh("cpu", (RANKS,), mesh_dim_names=("dp_shard",)),
    "hsdp": lambda: dist.init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("dp_replicate", "dp_shard")),
    "replicated": lambda: dist.init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("dp_replicate", "dp_shard")),
}
FSDP_CASES = [(name, "no mesh", "untied") for name in WRAPPINGS]
FSDP_CASES += [(name, "no mesh", "tied") for name in ("root", "root_resharded")]  # tied weights must be in one group
FSDP_CASES += [("head_apart", mesh, "untied") for mesh in MESHES if mesh != "no mesh"]


def loss_of(model: Any, ids: Tensor, labels: Tensor, way: str) -> Tensor:
    if way == "fused":
        with fuse_head(model):
            return model(ids, labels=labels).loss
    target = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    if way == "logits":
        return cross_entropy(model(input_ids=ids).logits.flatten(0, 1), target)
    hidden = model(input_ids=ids, output_hidden_states=True, logits_to_keep=1).hidden_states[-1].flatten(0, 1)
    batch = fp.Batch(target, torch.full((len(ids),), ids.shape[1]))
    loss = fp.fused_loss(fp.losses.sft, hidden, fp.Head.of(model), batch)
    assert isinstance(loss, Tensor)
    return loss


def two_steps(rank: int, wrapping: str, mesh: str, tied: str, way: str) -> list[Gradients]:
    model = lm(tied)
    WRAPPINGS[wrapping](model, MESHES[mesh]())
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, *inputs(rank), way).backward()
        found.append(gradients(model))
        optimizer.step()
    return found


# ---- tensor parallel ----


def tp_mesh(*names: str) -> DeviceMesh:
    return dist.init_device_mesh("cpu", (RANKS,), mesh_dim_names=names or None)


def colwise(model: Any, mesh: DeviceMesh) -> Any:
    return parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})


def by_hand() -> Any:
    return colwise(lm("untied"), tp_mesh("tp"))


def by_transformers(saved: Path) -> Any:
    """The trunk is parallel, too."""
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(RANKS)}
    return AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float64, tp_plan="auto", tp_size=RANKS)


def within_fsdp() -> Any:
    """A mesh of two dimensions, of which the weight is sharded over both."""
    mesh = dist.init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("dp_shard", "tp"))
    model = colwise(lm("untied"), mesh["tp"])
    fully_shard(model.lm_head, mesh=mesh["dp_shard"], reshard_after_forward=True)
    return fully_shard(model, mesh=mesh["dp_shard"])


PARALLEL: dict[str, Callable[[Path], Any]] = {
    "by hand": lambda _: by_hand(),
    "by transformers": by_transformers,
    "within FSDP": lambda _: within_fsdp(),
}


def tensor_parallel(saved: Path, how: str, way: str) -> Gradients:
    model = PARALLEL[how](saved)
    loss_of(model, *inputs(), way).backward()
    return gradients(model)


def unnamed() -> Gradients:
    model = colwise(lm("untied"), tp_mesh())
    ids, labels = inputs()
    with fuse_head(model, same_tokens=True):
        model(ids, labels=labels).loss.backward()
    return gradients(model)


def replicated(same_tokens: bool) -> Tensor:
    """The gradient of a replicated weight: that of the same tokens, or the mean over the ranks' own."""
    model = lm("untied")
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), tp_mesh(), [Replicate()]))
    head = fp.Head.of(model, same_tokens=same_tokens)
    ids, hidden = torch.arange(5), torch.full((5, 32), 1.0 + (0 if same_tokens else dist.get_rank())).double()
    fp.linear_logprobs(hidden, head, ids).sum().backward()
    return full(model.lm_head.weight.grad)


def plain(scale: float) -> Tensor:
    model = lm("untied")
    fp.linear_logprobs(torch.full((5, 32), scale).double(), fp.Head.of(model), torch.arange(5)).sum().backward()
    return model.lm_head.weight.grad


def accepted(model: Any) -> bool:
    check_head(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    own = lm("untied")
    model.forward = own.forward
    with pytest.raises(ValueError, match="does not give the model's own logits"):
        check_head(model)
    return True


def refusals() -> dict[str, str]:
    def by_columns() -> Any:
        model = lm("untied")
        weight = distribute_tensor(model.lm_head.weight.detach(), tp_mesh("tp"), [Shard(1)])
        model.lm_head.weight = nn.Parameter(weight)
        return model

    def padded() -> Any:
        model = colwise(lm("untied"), tp_mesh("tp"))
        model.config.unpadded_vocab_size = 90
        return model

    calls = {
        "no names": lambda: fp.Head.of(colwise(lm("untied"), tp_mesh())),
        "no names, fused": lambda: fuse_head(colwise(lm("untied"), tp_mesh())),
        "a strange name": lambda: fp.Head.of(colwise(lm("untied"), tp_mesh("ranks"))),
        "columns": lambda: fp.Head.of(by_columns()),
        "padded": lambda: fp.Head.of(padded()),
    }
    found = {}
    for name, call in calls.items():
        with pytest.raises(ValueError) as error:
            call()
        found[name] = str(error.value)
    return found


# ---- PEFT ----


def adapted() -> Any:
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"])
    model = get_peft_model(lm("untied"), config).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


def adapter_steps(rank: int, way: str) -> list[Gradients]:
    model = adapted()
    if way == "fused first":
        fuse_head(model)
    fully_shard(model.base_model.model.model.layers[0])
    fully_shard(model, reshard_after_forward=True)
    found = []
    for _ in range(2):
        ids, labels = inputs(rank)
        loss = model(ids, labels=labels).loss if way == "fused first" else loss_of(model, ids, labels, way)
        loss.backward()
        found.append(gradients(model))
    return found


def gathered(model: Any, root: Any) -> list[str]:
    """What an optimizer that is made after fuse_head would not find the shards of."""
    fully_shard(root.model.layers[0])
    fully_shard(model)
    fuse_head(model)
    return [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]


def on_rank(saved: Path, rank: int) -> dict:
    return {
        "fsdp": {(*case, way): two_steps(rank, *case, way) for case in FSDP_CASES for way in WAYS},
        "tp": {(how, way): tensor_parallel(saved, how, way) for how in PARALLEL for way in WAYS},
        "replicated": [replicated(same) for same in (True, False)],
        "unnamed": unnamed(),
        "adapter": {way: adapter_steps(rank, way) for way in ADAPTER_WAYS},
        "gathered": [gathered(model := lm("untied"), model), gathered(model := adapted(), model.get_base_model())],
        "probe": accepted(by_hand()),
        "sizes": fp.Head.of(colwise(lm("untied"), tp_mesh()), same_tokens=True).shard.sizes,
        "refusals": refusals(),
    }


# ---- tests ----


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    lm("untied").save_pretrained(folder / "model")
    return two_processes(functools.partial(on_rank, folder / "model"), folder, seconds=150.0)


@pytest.mark.parametrize("way", ["head", "fused"])
@pytest.mark.parametrize(("wrapping", "mesh", "tied"), FSDP_CASES)
def test_under_fsdp_two_steps_are_those_of_the_models_own_forward(found, wrapping, mesh, tied, way):
    for rank in found:
        ours, own = (rank["fsdp"][wrapping, mesh, tied, each] for each in (way, "logits"))
        for step in range(2):
            assert all(own[step][name].any() for name in own[step])
            torch.testing.assert_close(ours[step], own[step])


@pytest.mark.parametrize("way", ADAPTER_WAYS[1:])
def test_an_adapter_on_a_head_under_fsdp_trains_as_in_the_models_own_forward(found, way):
    for rank in found:
        torch.testing.assert_close(rank["adapter"][way], rank["adapter"]["logits"])


def test_fuse_head_leaves_every_parameter_in_its_shards(found):
    """While FSDP2 has them gathered they are others, which an optimizer would train in vain."""
    assert [rank["gathered"] for rank in found] == [[[], []]] * RANKS


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", PARALLEL)
def test_tensor_parallel_is_one_process(found, how, way):
    model = lm("untied")
    loss_of(model, *inputs(), "logits").backward()
    for rank in found:
        torch.testing.assert_close(rank["tp"][how, way], gradients(model))


def test_fuse_head_may_be_told_that_the_ranks_have_the_same_tokens(found):
    model = lm("untied")
    loss_of(model, *inputs(), "logits").backward()
    for rank in found:
        torch.testing.assert_close(rank["unnamed"], gradients(model))


def test_a_replicated_weight_has_the_gradient_of_the_same_tokens_or_the_mean(found):
    for rank in found:
        same, own = rank["replicated"]
        torch.testing.assert_close(same, plain(1.0))
        torch.testing.assert_close(own, (plain(1.0) + plain(2.0)) / 2)


def test_uneven_rows_are_those_of_the_dtensor(found):
    assert [rank["sizes"] for rank in found] == [(49, 48)] * RANKS


def test_a_shard_is_held_against_the_models_own_logits(found):
    assert all(rank["probe"] for rank in found)


REFUSALS = {
    "no names": r"a mesh of \(2,\) ranks without names.*pass same_tokens=True for tensor parallelism",
    "no names, fused": r"a mesh of \(2,\) ranks without names.*pass same_tokens=True for tensor parallelism",
    "a strange name": r"ranks named \('ranks',\), and it is not known whether",
    "columns": r"sharded over a mesh of \(2,\) ranks named \('tp',\) as .*takes rows of the vocabulary, Shard\(0\)",
    "padded": "the head's 97 rows are padded from a vocabulary of 90, and sharded over ranks",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_ambiguous_is_refused_by_name(found, what):
    for rank in found:
        with pytest.raises(ValueError, match=REFUSALS[what]):
            raise ValueError(rank["refusals"][what])
