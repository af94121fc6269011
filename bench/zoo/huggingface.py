"""Models of transformers, from small configurations: nothing is downloaded.

Widths are small and odd where the architecture allows it. Dropout and layer drop are zero, caches are off.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bench.zoo.entry import Entry, Inputs, normal, tokens

_VOCABULARY = 53
_LABELS: dict[str, Any] = {"num_labels": 5}
_PICTURE: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_channels": 3}
_LAYERS: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
_QUIET: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_TEXT: dict[str, Any] = {"vocab_size": _VOCABULARY, "max_position_embeddings": 20, "pad_token_id": 1}
_CACHELESS: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "use_cache": False,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_DECODER: dict[str, Any] = {
    **_LAYERS,
    **_CACHELESS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 20,
    "attention_dropout": 0.0,
}


def _build(model: str, config: str, attention: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers: Any = importlib.import_module("transformers")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some configurations warn of their own defaults
            made = getattr(transformers, config)(**settings)
            made._attn_implementation = attention
            return getattr(transformers, model)(made)

    return build


class Logits(nn.Module):
    """Gives the first named output alone, as an application would that needs no other."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, **inputs: Tensor) -> Tensor:
        return getattr(self.model(**inputs), self.name)


def _entry(
    model: str,
    config: str,
    inputs: Callable[[], Inputs],
    attention: str = "sdpa",
    coverage: float = 0.95,
    **settings: Any,
) -> Entry:
    return Entry(_build(model, config, attention, **settings), inputs, coverage)


def _named(**named: Callable[[], Inputs]) -> Callable[[], Inputs]:
    """Inputs given by keyword."""
    return lambda: ((), {name: inputs()[0][0] for name, inputs in named.items()})


_images = normal((3, 32, 32))
_words = tokens(_VOCABULARY, (11,))


_CLIP = _entry(
    "CLIPModel",
    "CLIPConfig",
    _named(input_ids=_words, pixel_values=_images),
    coverage=0.65,  # the last hidden states are outputs, hence both residual streams
    text_config=_LAYERS | _TEXT | {"attention_dropout": 0.0, "eos_token_id": 2, "bos_token_id": 0},
    vision_config=_LAYERS | _PICTURE | {"hidden_size": 18, "attention_dropout": 0.0},
    projection_dim=14,
)
_T5 = _entry(
    "T5ForConditionalGeneration",
    "T5Config",
    _named(input_ids=_words, decoder_input_ids=tokens(_VOCABULARY, (7,))),
    "eager",
    coverage=0.92,  # the encoder's residual stream is an output, and the embedding is shared
    d_model=24,
    d_kv=6,
    d_ff=40,
    num_layers=2,
    num_heads=3,
    dropout_rate=0.0,
    feed_forward_proj="gated-gelu",
    decoder_start_token_id=1,
    **_CACHELESS,
)


def _first(entry: Entry, name: str) -> Entry:
    return Entry(lambda: Logits(entry.build(), name), entry.inputs)


MODELS: dict[str, Entry] = {
    "hf:vit": _entry("ViTForImageClassification", "ViTConfig", _images, **_PICTURE, **_LAYERS, **_QUIET, **_LABELS),
    "hf:vit_eager": _entry(
        "ViTForImageClassification", "ViTConfig", _images, "eager", **_PICTURE, **_LAYERS, **_QUIET, **_LABELS
    ),
    "hf:deit": _entry(
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        _images,
        **_PICTURE,
        **_LAYERS,
        **_QUIET,
        **_LABELS,
    ),
    "hf:swin": _entry(
        "SwinForImageClassification",
        "SwinConfig",
        _images,
        "eager",
        image_size=32,
        patch_size=2,
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 3],
        window_size=4,
        drop_path_rate=0.0,
        **_QUIET,
        **_LABELS,
    ),
    "hf:convnextv2": _entry(
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        normal((3, 64, 64)),
        "eager",
        hidden_sizes=[10, 14, 18, 22],
        depths=[1, 2, 1, 1],
        drop_path_rate=0.0,
        **_LABELS,
    ),
    "hf:segformer": _entry(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        normal((3, 64, 64)),
        "eager",
        num_encoder_blocks=3,
        depths=[1, 2, 1],
        sr_ratios=[4, 2, 1],
        hidden_sizes=[10, 12, 18],
        patch_sizes=[7, 3, 3],
        strides=[4, 2, 2],
        num_attention_heads=[1, 2, 3],
        mlp_ratios=[2, 2, 2],
        decoder_hidden_size=14,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
        **_QUIET,
        **_LABELS,
    ),
    "hf:mobilevit": _entry(
        "MobileViTForImageClassification",
        "MobileViTConfig",
        normal((3, 64, 64)),
        "eager",
        image_size=64,
        hidden_sizes=[12, 18, 24],
        neck_hidden_sizes=[8, 10, 14, 18, 22, 26, 30],
        num_attention_heads=3,
        classifier_dropout_prob=0.0,
        **_QUIET,
        **_LABELS,
    ),
    "hf:dinov2": _entry(
        "Dinov2ForImageClassification",
        "Dinov2Config",
        _images,
        **_PICTURE,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        use_swiglu_ffn=True,
        drop_path_rate=0.0,
        **_QUIET,
        **_LABELS,
    ),
    "hf:vitmae": _entry(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        lambda: ((normal((3, 32, 32))()[0][0],), {"noise": normal((16,))()[0][0]}),
        mask_ratio=0.5,
        decoder_hidden_size=20,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=30,
        **_PICTURE,
        **_LAYERS,
        **_QUIET,
    ),
    "hf:clip": _CLIP,
    "hf:clip_logits": _first(_CLIP, "logits_per_image"),
    "hf:clip_classifier": _entry(
        "CLIPForImageClassification",
        "CLIPConfig",
        _images,
        vision_config=_LAYERS | _PICTURE | {"attention_dropout": 0.0},
        **_LABELS,
    ),
    "hf:bert": _entry("BertForSequenceClassification", "BertConfig", _words, **_LAYERS, **_TEXT, **_QUIET, **_LABELS),
    "hf:bert_mlm": _entry("BertForMaskedLM", "BertConfig", _words, "eager", **_LAYERS, **_TEXT, **_QUIET),
    "hf:roberta": _entry(
        "RobertaForSequenceClassification", "RobertaConfig", _words, **_LAYERS, **_TEXT, **_QUIET, **_LABELS
    ),
    "hf:distilbert": _entry(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        _words,
        dim=24,
        n_layers=2,
        n_heads=3,
        hidden_dim=40,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        **_TEXT,
        **_LABELS,
    ),
    "hf:gpt2": _entry(
        "GPT2LMHeadModel",
        "GPT2Config",
        _words,
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_positions=20,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        **_CACHELESS,
    ),
    "hf:llama": _entry("LlamaForCausalLM", "LlamaConfig", _words, **_DECODER),
    "hf:llama_eager": _entry("LlamaForCausalLM", "LlamaConfig", _words, "eager", **_DECODER),
    "hf:qwen2": _entry("Qwen2ForCausalLM", "Qwen2Config", _words, **_DECODER),
    "hf:mistral": _entry("MistralForCausalLM", "MistralConfig", _words, sliding_window=5, **_DECODER),
    "hf:gemma": _entry("GemmaForCausalLM", "GemmaConfig", _words, head_dim=6, **_DECODER),
    "hf:t5": _T5,
    "hf:t5_logits": _first(_T5, "logits"),
    "hf:opt": _entry(
        "OPTForCausalLM",
        "OPTConfig",
        _words,
        hidden_size=24,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=20,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        word_embed_proj_dim=20,
        **_CACHELESS,
    ),
    "hf:whisper": _entry(
        "WhisperForAudioClassification",
        "WhisperConfig",
        normal((13, 60)),
        num_mel_bins=13,
        d_model=24,
        encoder_layers=2,
        encoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_layers=1,
        decoder_attention_heads=3,
        decoder_ffn_dim=40,
        max_source_positions=30,
        classifier_proj_size=14,
        dropout=0.0,
        attention_dropout=0.0,
        **_CACHELESS,
        **_LABELS,
    ),
    "hf:wav2vec2": _entry(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        normal((400,)),
        conv_dim=[12, 14],
        conv_stride=[5, 2],
        conv_kernel=[10, 3],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=3,
        layerdrop=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        apply_spec_augment=False,
        classifier_proj_size=14,
        vocab_size=_VOCABULARY,
        **_LAYERS,
        **_LABELS,
    ),
}
