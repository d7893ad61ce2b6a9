"""All measurements on a GPU, run by bench/run_gpu.sh."""
