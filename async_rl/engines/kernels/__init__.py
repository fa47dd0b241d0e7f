"""Triton kernels of a decode step. Imported on a GPU only: Triton comes with torch's CUDA builds."""
