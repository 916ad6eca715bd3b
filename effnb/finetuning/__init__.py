"""Fine-tuning: adapting a trained model to a task with few trained numbers."""
