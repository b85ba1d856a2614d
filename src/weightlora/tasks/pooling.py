"""BERT for sequence classification and regression that pools by the mean over tokens, as sentence encoders do."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertPreTrainedModel


class MeanPooledBertConfig(BertConfig):
    """A `BertConfig` whose model pools by mean."""

    model_type = "mean_pooled_bert"


def masked_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the token vectors that the mask keeps: ``sum_t m_t h_t / max(1, sum_t m_t)``.

    Args:
        hidden: (batch, tokens, width), floating.
        mask: (batch, tokens), 1 for a token and 0 for padding.

    Returns:
        (batch, width), in the dtype of ``hidden``; padding neither counts nor gets a gradient.

    >>> masked_mean(torch.tensor([[[2.0], [4.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
    tensor([[3.]])
    """
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)


class MeanPooledBertForSequenceClassification(BertPreTrainedModel):
    """BERT, masked mean over tokens, dropout, linear classifier.

    For checkpoints trained with mean pooling (Sentence-BERT, Reimers and Gurevych 2019, section 3), whose first token
    carries no summary. Differs from ``BertForSequenceClassification`` in the pooling alone: no pooler layer.
    """

    config: MeanPooledBertConfig
    config_class = MeanPooledBertConfig
    # Checkpoints of plain BERT bring a pooler that has no place here.
    _keys_to_ignore_on_load_unexpected: list[str] | None = [r"pooler"]  # noqa: RUF012 - the base class's type
    # The loss is a mean over the micro-batch; the trainer must divide it by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: MeanPooledBertConfig) -> None:
        super().__init__(config)
        self.num_labels = cast(int, config.num_labels)
        self.bert = BertModel(config, add_pooling_layer=False)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def forward(  # noqa: PLR0913, PLR0917 - the signature of BERT
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[torch.Tensor, ...]:
        """Return logits (batch, num_labels) and, with labels, the loss: cross entropy, or squared error.

        Args:
            input_ids: (batch, tokens).
            attention_mask: (batch, tokens), 1 for tokens; None means no padding.
            token_type_ids: (batch, tokens), 0 for the first text and 1 for the second.
            position_ids: (batch, tokens).
            inputs_embeds: (batch, tokens, width), instead of ``input_ids``.
            labels: (batch,), class indices, or targets for regression.
            output_attentions: also return the attention weights of every layer.
            output_hidden_states: also return the hidden states of every layer.
            return_dict: False for a plain tuple.
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        mask = hidden.new_ones(hidden.shape[:2]) if attention_mask is None else attention_mask
        logits = self.classifier(self.dropout(masked_mean(hidden, mask)))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        result = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return result.to_tuple() if return_dict is False else result


AutoConfig.register(MeanPooledBertConfig.model_type, MeanPooledBertConfig, exist_ok=True)
AutoModelForSequenceClassification.register(
    MeanPooledBertConfig, MeanPooledBertForSequenceClassification, exist_ok=True
)
