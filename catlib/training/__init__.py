"""Fine-tuning: LoRA on the language model, the trainer, its loss and kernels, what it needs in memory."""
