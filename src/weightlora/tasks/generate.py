"""Evaluation of decoders by generation: from the prompt alone, which the labels tell apart from its completion."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer

from weightlora.tasks.evaluation import Step, token_scores, without_loss


def prompts_of(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Cut a batch down to its prompts, padded on the left as generation needs it.

    Args:
        input_ids: (rows, tokens), prompt and completion.
        attention_mask: (rows, tokens), 0 for padding on either side.
        labels: (rows, tokens), -100 for the prompt and for padding.
        padding: the padding token.

    Returns:
        Token ids and attention mask, (rows, longest prompt).

    >>> ids = torch.tensor([[5, 6, 7, 0], [5, 8, 9, 9]])
    >>> labels = torch.tensor([[-100, -100, 7, -100], [-100, 8, 9, 9]])
    >>> prompts_of(ids, torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), labels, padding=0)
    (tensor([[5, 6],
            [0, 5]]), tensor([[1, 1],
            [0, 1]]))
    """
    prompts = (attention_mask != 0) & (labels == -100)
    lengths = prompts.sum(1)
    width = int(lengths.max())
    mask = torch.arange(width, device=input_ids.device) >= (width - lengths)[:, None]
    ids = input_ids.new_full((len(input_ids), width), padding)
    ids[mask] = input_ids[prompts]
    return ids, mask.to(attention_mask.dtype)


class PromptTrainer(Seq2SeqTrainer):
    """``Seq2SeqTrainer`` for decoders: generation starts from the rows' prompts.

    Predictions are the generated tokens and the `token_scores` of the given completions; ``eval_loss`` is left to
    ``compute_metrics``, as :class:`weightlora.tasks.evaluation.OwnLossTrainer` does.
    ``generation_max_length`` counts the tokens that are generated. Sampling is off, so that a result can be repeated.
    """

    def prediction_step(  # type: ignore[override]  # predictions may be several tensors
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: object,
    ) -> Step:
        if prediction_loss_only or not self.args.predict_with_generate:  # type: ignore[attr-defined]
            return Trainer.prediction_step(self, model, inputs, True, ignore_keys)
        inputs = dict(self._prepare_inputs(inputs))
        scores = token_scores(*without_loss(self, model, inputs, ignore_keys))
        generator = cast(PreTrainedModel, self.model)
        ids, mask = prompts_of(
            inputs["input_ids"],
            inputs["attention_mask"],
            inputs["labels"],
            generator.config.get_text_config().pad_token_id,
        )
        tokens = generator.generate(  # type: ignore[operator]  # a decoder has it
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self.args.generation_max_length,  # type: ignore[attr-defined]
            num_beams=self.args.generation_num_beams or 1,  # type: ignore[attr-defined]
            do_sample=False,
            use_cache=True,
        )
        return None, (tokens[:, ids.shape[1] :].contiguous(), scores), inputs["labels"]
