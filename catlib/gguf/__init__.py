"""Optional: writing a model for llama.cpp (GGUF), and what vLLM needs to start on a CPU."""
