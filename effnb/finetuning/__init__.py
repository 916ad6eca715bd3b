"""Fine-tuning: adapting a trained model to a task with few trained numbers.

Each method is a module with an `attach`: `adapters`, `ia3`, `lora`, `prefix_tuning` and
`prompt_tuning`. What is done with a delta afterwards is the same for all; see `effnb.core.deltas`.
"""
