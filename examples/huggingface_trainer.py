"""Train a Hugging Face model with its dynamic teacher in `transformers.Trainer`: three lines of a loss.

    python examples/huggingface_trainer.py

The task is a toy (does the token 7 occur more often than the token 8?), so that nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import gpd_fx

LENGTH = 16


class GPDTrainer(Trainer):
    """A Trainer whose model is a dynamic teacher."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.criterion = gpd_fx.GPDLoss()
        self.model_accepts_loss_kwargs = False  # it takes any keyword, but is no judge of the loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective of both networks, from one call, so that data-parallel training sees it."""
        labels = inputs.pop("labels")
        teacher_out, student_out = model(**inputs, role="both")
        loss = self.criterion(student_out, teacher_out, labels).total
        return (loss, {"logits": student_out.logits}) if return_outputs else loss


class Tokens(Dataset[dict[str, Tensor]]):
    """Random tokens of a fixed length, which the captured graph has."""

    def __init__(self, count: int, seed: int) -> None:
        self.tokens = torch.randint(5, 10, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
        self.labels = ((self.tokens == 7).sum(1) > (self.tokens == 8).sum(1)).long()

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        tokens = self.tokens[number]
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": self.labels[number]}

    def __len__(self) -> int:
        return len(self.labels)


def main(folder: str = "hf-run", count: int = 4096, epochs: int = 3) -> float:
    """Train, take the student out, and return its accuracy on other tokens."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=10, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    student = BertForSequenceClassification(config)
    example = {key: torch.stack([value] * 2) for key, value in Tokens(1, 0)[0].items() if key != "labels"}
    teacher = gpd_fx.expand(student, ratio=2.0, example_kwargs=example)
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        remove_unused_columns=False,  # the Trainer would look for their names in the teacher's signature
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        logging_steps=32,
    )
    GPDTrainer(teacher, arguments, train_dataset=Tokens(count, 1)).train()
    trained: Any = gpd_fx.fold(teacher).cpu().eval()  # a BertForSequenceClassification
    trained.save_pretrained(folder)
    test = Tokens(1024, 2)
    with torch.no_grad():
        logits = trained(test.tokens, attention_mask=torch.ones_like(test.tokens)).logits
    return float((logits.argmax(1) == test.labels).float().mean())


if __name__ == "__main__":
    print(f"the student's accuracy: {main():.2%}")
