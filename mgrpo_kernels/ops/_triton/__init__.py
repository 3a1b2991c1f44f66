"""What the Triton backends share: launches and their shapes; the online softmax. Only `kernels.py` imports triton."""
