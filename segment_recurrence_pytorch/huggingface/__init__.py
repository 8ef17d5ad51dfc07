"""Pretrained language models of Hugging Face `transformers` as segment-recurrent models (extra `hf`).

    decoder      what both retrofits share: finding the decoder, its limits, and what is refused
    trainer      `ForTrainer`, which trains a wrapper with `transformers.Trainer`
    evaluation   `SegmentLM`, which scores a wrapper with `lm_eval` (extra `eval`)

The retrofits themselves are `recurrent_memory_transformer_pytorch.huggingface.RecurrentMemoryLM` and
`infini_transformer_pytorch.huggingface.add_infini_attention`. No package imports these modules on its own import.
"""
