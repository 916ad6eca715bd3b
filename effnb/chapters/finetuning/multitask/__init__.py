"""What `notebooks/04_finetuning/3_multitask` shows, asks and judges."""
