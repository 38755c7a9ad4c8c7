"""Operations on tensors, by whoever runs them fastest: Triton, native code or torch (`dispatch`, `providers`); random
numbers (`randomness`) and CUDA graphs (`graphs`)."""
