# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour on the built-in task
#
# This notebook trains MiniLM to tell the topic of a docstring, finds out which of its 36 adapters matter, compares that with plain LoRA, and
# writes the result. It needs `pip install -e ".[demo]"` and no network: model and rows come with the install.
#
# It is made from `notebooks/tour.py` by `make notebooks`.

# %%
import logging
import os
import warnings

logging.disable(logging.WARNING)
warnings.filterwarnings("ignore")  # of libraries among themselves

from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments, set_seed

import weightlora as wl
from weightlora.tasks import load_model, load_task, tokenize

SMALL = "WEIGHTLORA_SMALL" in os.environ  # the tests run it at a small scale
NAME, ROWS, STEPS = ("bert-tiny-shape", 40, 6) if SMALL else ("minilm", 1000, 60)

# %% [markdown]
# ## Rows and a model with adapters everywhere
#
# `load_task` reads the embedded task, and `load_model` gives a model, its tokenizer, and the names of its linear layers. Any model and any
# rows of yours will do as well.


# %%
def prepare():
    task = load_task("docstrings", max_train_samples=ROWS, max_eval_samples=max(ROWS // 2, 20))
    loaded = load_model(NAME, num_labels=task.num_labels, labels=task.labels)
    train, validation = tokenize(task, loaded.tokenizer, max_length=48)
    set_seed(0)
    model = get_peft_model(
        loaded.model,
        LoraConfig(r=8, target_modules=list(loaded.linear_targets), modules_to_save=list(loaded.heads)),
    )
    args = TrainingArguments(
        "out/tour",
        max_steps=STEPS,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=DataCollatorWithPadding(loaded.tokenizer),
        compute_metrics=task.compute_metrics,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


# %% [markdown]
# ## Train, and let it choose
#
# `wl.fit` takes the place of `trainer.train()`. All adapters train until `select_after`; then a quarter of them stays.

# %%
trainer = prepare()
result = wl.fit(trainer, wl.WeightLoRA(k=0.25, select_after=0.2), overwrite=True)
selection = result.selection
print(f"kept {selection.k} of {selection.n}: {selection.why}")

# %% [markdown]
# ## Where are they?
#
# One line per layer, from the deepest down. A star is an adapter that stayed.

# %%
blocks = {}
for choice in selection.choices:
    block, kind = choice.name.split("layer.")[1].split(".", 1)
    blocks.setdefault(int(block), []).append((kind, choice.kept))
for block in sorted(blocks, reverse=True):
    print(f"layer {block}: ", *("*" if stays else "." for _, stays in blocks[block]))
print("kinds, from left to right:", ", ".join(kind for kind, _ in blocks[0]))

# %% [markdown]
# ## What did it save?
#
# Bytes and operations are counted on one micro-batch of each phase: before the others were removed, and after it.

# %%
for phase in result.phases:
    print(
        f"{phase.name:7} {phase.steps:3} steps  {phase.trainable_params / 1e3:6.1f} k parameters train  "
        f"{phase.kept_activation_bytes / 2**20:6.1f} MiB kept for backward  {phase.flops_per_step / 1e9:5.1f} GFLOP a step"
    )

# %% [markdown]
# ## Is it as good as LoRA on all adapters?
#
# The same rows, the same seed, the same steps.

# %%
chosen = trainer.evaluate()
everywhere = prepare()
wl.fit(everywhere, wl.LoRA(), overwrite=True)
for name, scores in (("chosen", chosen), ("all", everywhere.evaluate())):
    print(f"{name:7} accuracy {scores['eval_accuracy']:.3f}  loss {scores['eval_loss']:.3f}")

# %% [markdown]
# One seed proves nothing. `weightlora compare --methods weightlora,lora,random --seeds 0,1,2 ...` runs the same over seeds, beside as many
# adapters drawn at random.
#
# ## Write it, or take the placement elsewhere

# %%
done = wl.export(result, "out/adapter", overwrite=True)
print(done.profile, "export; largest difference of a logit after loading it again:", f"{done.max_difference:.1g}")
config = selection.lora_config(task_type="SEQ_CLS")
print("the same placement for any PEFT program:", config.r, sorted(config.target_modules)[:2], "...")
