"""Group relative policy optimization towards completions without the letter e."""

from dataclasses import dataclass, field

from trl import GRPOConfig, GRPOTrainer

from halfbyte import Recipe


@dataclass
class BrevityConfig(GRPOConfig):
    forbidden: str = field(default="e", metadata={"help": "The letter that costs reward."})
    learning_rate: float = field(default=1e-2, metadata={"help": "The initial learning rate."})


def build(config, plugin, data):
    def without_the_letter(completions, **kwargs):
        print("rewarding", len(completions), "completions", flush=True)
        lengths = [len(ids) for ids in data.tokenizer(completions)["input_ids"]]
        return [
            float(-completion.count(config.forbidden) - length)
            for completion, length in zip(completions, lengths, strict=True)
        ]

    return plugin.trainer(
        GRPOTrainer, args=config, train_dataset=data.train, reward_funcs=[without_the_letter]
    )


recipe = Recipe(config=BrevityConfig, summary="GRPO with a reward of its own", build=build)
