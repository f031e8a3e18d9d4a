"""A sweep of thresholds: an adapter for each on one model in memory, and what each has of both objectives.

python examples/04_sweep.py MODEL PAIRS.jsonl --primary helpful --held harmless --thresholds 0.45 0.5 0.55

`mopo train --sweep` does the same with checkpoints, held-out data and a picture: docs/guides/sweeps.md.
"""

from __future__ import annotations

import argparse

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mopo_kernels import MOPOConfig, MOPOTrainer, load_preferences

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("model", help="folder or hub name of a causal language model")
parser.add_argument("pairs", help="preference file: docs/guides/data.md")
parser.add_argument("--primary", default="helpful", help="the objective that is maximised")
parser.add_argument("--held", default="harmless", help="the objective under a threshold")
parser.add_argument("--thresholds", type=float, nargs="+", default=[0.45, 0.5, 0.55])
parser.add_argument("--output", default="runs/04_sweep")
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model)
data = load_preferences(options.pairs)
for threshold in options.thresholds:
    policy = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    config = MOPOConfig(
        f"{options.output}/{threshold:g}",
        primary=options.primary,
        thresholds={options.held: threshold},
        reference="precomputed",
        reference_path=options.output,  # log-probabilities that all runs share
        max_steps=options.steps,
        per_device_train_batch_size=4,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = MOPOTrainer(model=policy, args=config, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate()  # on the training data: pass data that was held out to know how it generalises
    values = [metrics[f"eval_satisfaction/{name}"] for name in (options.primary, options.held)]
    print(f"{options.held} >= {threshold:g}: {options.primary} {values[0]:.3f}, {options.held} {values[1]:.3f}")
    policy.unload()  # takes the adapter off the model again
