"""What of a model is trained, in words: adapters with their rank and the modules that carry them, and what is whole."""

from typing import Any

from torch import nn

from halfbyte.terminal.wording import count


def trained_parameters(model: nn.Module) -> int:
    """Return how many parameters of ``model`` are trained."""
    # DeepSpeed leaves nothing of a parameter on the ranks that do not hold it, but its size.
    return sum(
        getattr(each, "ds_numel", None) or each.numel() for each in model.parameters() if each.requires_grad
    )


def trained_modules(model: Any) -> str:
    """Return which modules of ``model`` carry trained adapters, and of what rank; and what is trained beside them."""
    adapted, tokens, whole = set(), set(), set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        module, _, adapter = name.partition(".lora_")
        if adapter:
            adapted.add(_last(module))
        elif ".token_adapter." in name:
            tokens.add(_last(name.partition(".token_adapter.")[0]))
        else:
            saved, _, inside = name.partition(".modules_to_save.")
            whole.add(_last(saved if inside else name.rpartition(".")[0]))
    configurations = getattr(model, "peft_config", None)
    if not configurations:
        return "all weights"
    found = []
    if adapted:
        config = configurations[model.active_adapter]
        others = " and others" if config.rank_pattern else ""
        found.append(f"LoRA of rank {config.r}{others} on {', '.join(sorted(adapted))}")
    if tokens:
        found.append(f"rows of {', '.join(sorted(tokens))}")
    if whole:
        found.append(f"{', '.join(sorted(whole))} whole")
    return "; ".join(found)


def trained_line(model: Any) -> str:
    """Return the line that says what is trained."""
    return f"trained: {count(trained_parameters(model))} parameters, {trained_modules(model)}"


def _last(name: str) -> str:
    """The last part of a module's name that is its own."""
    own = [part for part in name.split(".") if part not in ("base_layer", "original_module")]
    return own[-1]
