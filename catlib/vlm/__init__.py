"""The vision-language model: loading, LoRA, batches, frozen features, training, label likelihood, memory."""
