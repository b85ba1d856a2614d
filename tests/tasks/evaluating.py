"""A prepared task judged as a run does it."""

from __future__ import annotations

from pathlib import Path

from transformers import Seq2SeqTrainingArguments

from weightlora.tasks import LoadedModel, Prepared


def evaluate(parts: Prepared, loaded: LoadedModel, folder: Path) -> dict[str, float]:
    """As a run does it, in batches of unequal rows."""
    settings = {**parts.training, "per_device_eval_batch_size": 3}
    args = Seq2SeqTrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **settings)
    trainer = parts.trainer(
        model=loaded.model,
        args=args,
        eval_dataset=parts.validation,
        data_collator=parts.collator,
        compute_metrics=parts.compute_metrics,
        preprocess_logits_for_metrics=parts.preprocess_logits,
    )
    found: dict[str, float] = trainer.evaluate()
    return found
