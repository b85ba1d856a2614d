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
# # SmolLM2 with TRL
#
# This notebook plans a run, fine-tunes SmolLM2-135M with TRL's own trainer, lets it choose a tenth of its 210 adapters, compares that with
# LoRA on all of them, writes a report, and exports an adapter for a server. It needs `pip install -e ".[trl,tasks,report]"` and `make smollm2`.
#
# It is made from `notebooks/smollm2.py` by `make notebooks`.

# %%
import json
import logging
import os
import warnings
from pathlib import Path

logging.disable(logging.WARNING)
warnings.filterwarnings("ignore")  # of libraries among themselves

from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

import weightlora as wl
from weightlora.cli.main import main
from weightlora.tasks import load_model, load_task

disable_progress_bars()
SMALL = "WEIGHTLORA_SMALL" in os.environ  # the tests run it at a small scale, on random weights
NAME, ROWS, STEPS, K = ("llama-small-shape", 16, 4, 5) if SMALL else ("smollm2", 32, 6, 21)
Path("out").mkdir(exist_ok=True)

# %% [markdown]
# ## Plan
#
# Will it fit into 4 GiB? `plan` needs no weights.

# %%
main(["plan", "--model", "smollm2", "--length", "64", "--batch", "8", "--memory", "4GiB", "--k", "21"])

# %% [markdown]
# ## Rows
#
# A docstring of Python's standard library is the prompt, and its topic the completion. `out/train.jsonl` holds the same rows for the command line.

# %%
task = load_task("docstrings", max_train_samples=ROWS, max_eval_samples=max(ROWS // 3, 8))


def told(rows):
    return [{"prompt": row["text"][:120] + "\nTopic:", "completion": " " + task.labels[row["label"]]} for row in rows]


train, validation = told(task.train), told(task.validation)
for name, rows in (("train", train), ("validation", validation)):
    Path(f"out/{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
print(train[0])

# %% [markdown]
# ## Select, with TRL's trainer

# %%
base = "out/base"
loaded = load_model(NAME, head="causal-lm")
loaded.model.save_pretrained(base)
loaded.tokenizer.eos_token = loaded.tokenizer.eos_token or "[SEP]"  # the small shape has none
loaded.tokenizer.save_pretrained(base)


def prepare():
    set_seed(0)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype="float32"),
        args=SFTConfig(
            "out/sft",
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=5e-4,
            max_length=48,
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(validation),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


trainer = prepare()
result = wl.fit(trainer, wl.WeightLoRA(k=K, select_after=0.3), overwrite=True)  # in place of trainer.train()
print(f"kept {result.selection.k} of {result.selection.n}: {result.selection.why}")
print(*result.selection.names, sep="\n")

# %% [markdown]
# ## Compare with LoRA on all of them

# %%
chosen = trainer.evaluate()["eval_loss"]
everywhere = prepare()
untrained = everywhere.evaluate()["eval_loss"]
whole = wl.fit(everywhere, wl.LoRA(), overwrite=True)
for name, loss, fitted in (("chosen", chosen, result), ("all", everywhere.evaluate()["eval_loss"], whole)):
    last = fitted.phases[-1]
    print(
        f"{name:7} loss {loss:.3f}  {last.trainable_params / 1e6:.2f} M parameters train  "
        f"{last.kept_activation_bytes / 2**20:.0f} MiB kept for backward"
    )
print(f"before  loss {untrained:.3f}")

# %% [markdown]
# One seed on few rows: this shows how to ask, and settles nothing. [The evidence](../evidence.md) has runs over seeds.
#
# ## The same by the command line, with a report

# %%
words = f"--validation-file out/validation.jsonl --model {base} --k {K} --max-length 48 --per-device-train-batch-size 4"
main(
    f"train --task out/train.jsonl {words} --max-steps {max(STEPS // 2, 3)} --select-after 0.5 --out out/run --overwrite".split()
)
main(["report", "out/run", "--out", "out/report.html"])

# %% [markdown]
# ## Serve
#
# `portable` is what vLLM, SGLang and llama.cpp read. It is loaded again with stock PEFT, and its logits are compared, before it counts as done.

# %%
done = wl.export(result, "out/served", profile="portable", overwrite=True)
print(f"vllm serve {base} --enable-lora --lora-modules topics=out/served --max-lora-rank {done.rank}")
print(f"python llama.cpp/convert_lora_to_gguf.py out/served --base {base} --outfile topics.gguf")
