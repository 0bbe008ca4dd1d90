"""Low-rank adapters on a model: y = W x + scaling B A x, W frozen, A (r, in) and B (out, r) trained (arXiv:2106.09685).

  scaling  lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (arXiv:2312.03732)
  use_dora y = m (W x + scaling B A x) / |W + scaling B A|, a trained length m to each output (arXiv:2402.09353)

The layers, their initialisation and their files are peft's; here its silences are closed: a name in target_modules that
no layer has, and what an adapter beside tied embeddings comes to.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from fastpost.types import nearest

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

INITS = (True, False, "gaussian", "orthogonal")  # peft's, of those that leave the base alone
ALL_LINEAR = "all-linear"  # peft's word for every linear layer but the head


def lora_config(
    lora_r: int,
    *,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    lora_target_modules: str | Sequence[str] = ALL_LINEAR,  # names, or one regular expression
    lora_modules_to_save: Sequence[str] = (),  # trained whole
    use_rslora: bool = False,
    use_dora: bool = False,
    init_lora_weights: bool | str = True,
) -> LoraConfig:
    """peft's LoraConfig, by the names that TRL gives its fields."""
    from peft import LoraConfig

    if init_lora_weights not in INITS:
        raise ValueError(
            f"init_lora_weights must be one of {', '.join(map(str, INITS))}, got {init_lora_weights!r}: others change "
            "the base as well, so that a saved adapter would fit no other copy of it, or want data"
        )
    if lora_r < 1:
        raise ValueError(f"lora_r must be positive, the rank of the adapters, got {lora_r}")
    named = isinstance(lora_target_modules, str)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=lora_target_modules if named else list(lora_target_modules),
        modules_to_save=list(lora_modules_to_save) or None,
        use_rslora=use_rslora,
        use_dora=use_dora,
        init_lora_weights=init_lora_weights,  # type: ignore[arg-type]  # bool | Literal[...] there
    )


def with_lora(model: Any, config: LoraConfig) -> PeftModel:
    """The model, frozen, with the adapter that the config describes, fresh and trainable."""
    from peft import get_peft_model

    config = copy.copy(config)
    _refuse_unknown("lora_modules_to_save", config.modules_to_save or (), model)
    config.target_modules = _targets(model, config.target_modules)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(
            f"lora_target_modules {config.target_modules!r} do not fit {type(model).__name__}: {error}"
        ) from error


def beside_tied(model: PeftModel) -> str | None:
    """What it comes to that an adapter is on one of two tied embeddings; None where that is not so."""
    lm: Any = model.get_base_model()
    if not lm.config.get_text_config().tie_word_embeddings:
        return None
    ends = {"the embedding": lm.get_input_embeddings(), "the head": lm.get_output_embeddings()}
    own = [name for name, layer in ends.items() if hasattr(layer, "base_layer") or hasattr(layer, "modules_to_save")]
    if not own:
        return None
    return (
        "embedding and head are tied: the weight that they share stays as it is, what trains on "
        f"{' and on '.join(own)} is for that alone, and merging unties them"
    )


def _targets(model: Any, names: Any) -> Any:
    """What peft is to look for. Among other names 'all-linear' would be one that no layer has."""
    if isinstance(names, str) or not names:
        return names
    if set(names) == {ALL_LINEAR}:
        return ALL_LINEAR
    found = set(_linear_names(model)) if ALL_LINEAR in names else set()
    rest = set(names) - {ALL_LINEAR}
    _refuse_unknown("lora_target_modules", rest, model)
    return found | rest


def _linear_names(model: Any) -> Iterator[str]:
    """Every linear layer but the head, as 'all-linear' means it: GPT-2's, whose weights are transposed, too."""
    from transformers.pytorch_utils import Conv1D

    head, linear = model.get_output_embeddings(), (nn.Linear, Conv1D)
    return (name for name, module in model.named_modules() if isinstance(module, linear) and module is not head)


def _refuse_unknown(field: str, names: Collection[str], model: nn.Module) -> None:
    """peft is content when one name of many is found."""
    known = [name for name, _ in model.named_modules()]
    for name in sorted(names):
        if not any(path == name or path.endswith(f".{name}") for path in known):
            near = nearest(name, sorted({path.rpartition(".")[2] for path in known}))
            raise ValueError(f"{field} has {name!r}, which no layer of {type(model).__name__} is called{near}")
