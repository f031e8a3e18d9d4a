"""The trainer on a preference file: LoRA under one threshold, then the policy's answer to a prompt.

python examples/03_trainer.py MODEL PAIRS.jsonl --primary helpful --threshold harmless=0.5
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
parser.add_argument("--threshold", default="harmless=0.5", help="OBJECTIVE=VALUE, the lowest satisfaction allowed")
parser.add_argument("--output", default="runs/03_trainer")
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model)
policy = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
data = load_preferences(options.pairs)
trainer = MOPOTrainer(
    model=policy,
    args=MOPOConfig(
        options.output,
        primary=options.primary,
        thresholds=options.threshold,
        learning_rate=1e-4,
        max_steps=options.steps,
        per_device_train_batch_size=4,  # prompts, each with all its responses
        logging_steps=10,
        report_to="none",
    ),
    train_dataset=data,
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model(f"{options.output}/final")  # the adapter and its model card

tokens = tokenizer(str(data[0].prompt), return_tensors="pt").to(model.device)
answer = policy.generate(**tokens, max_new_tokens=32, do_sample=False)[0, tokens["input_ids"].shape[1] :]
print(f"{data[0].prompt!r} -> {tokenizer.decode(answer, skip_special_tokens=True)!r}")
