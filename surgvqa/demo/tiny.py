"""Tiny models laid out like Qwen's model folders, with a tokenizer of their own and no weights.

A folder written here has the files a hub folder has (config, generation config, image processor, tokenizer,
chat template) with the same keys, so whatever reads a real model reads a tiny one. There are no weights: the
reader makes random ones from `config.json` under a seed of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from surgvqa.demo import scenes

TINY_MODELS = ("tiny-qwen2-vl", "tiny-qwen3-vl")

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen's, in Qwen's order; like Qwen's, their ids follow those of the learned vocabulary."""

VOCABULARY = 768
"""Learned tokens at most: 256 bytes and the merges."""

PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 and Qwen3 cut text before the byte pairs are merged."""

CORPUS = """
You are a helpful assistant. You are an expert in surgical video. Answer the question about the image in
one word or a short phrase. Answer with yes or no. Look at the whole view before you answer. The endoscope
is passed through the mouth into the oesophagus, the stomach and the duodenum. The mucosa is pink and
smooth with a fine pattern of vessels. The Z line lies at the junction of oesophagus and stomach. The
pylorus opens into the bulb. In the caecum the appendix orifice and the ileocaecal valve are seen. The
lumen of the colon is clean, the bowel preparation is good. There is a sessile polyp of six millimetres in
the ascending colon and a pedunculated polyp of twelve millimetres in the sigmoid. The polyp was removed
with a cold snare after submucosal injection. The margins are clear of residual tissue. A clip was placed
because of bleeding. Biopsies were taken from the antrum with forceps. Oesophagitis grade B, Barrett
metaplasia, ulcerative colitis, diverticulum, haemorrhoids, angiectasia, erosion, ulcer. The laparoscope
shows the gallbladder, the liver and the cystic duct. The grasper retracts the fundus towards the right
shoulder while the hook dissects the peritoneum of Calot's triangle. The critical view of safety is
achieved: two structures enter the gallbladder, the cystic artery and the cystic duct. The clipper places
three clips, the scissors cut between them. The gallbladder is dissected from the liver bed and packaged
in a specimen bag. The irrigator washes and aspirates blood and bile. Smoke from the bipolar forceps
obscures the view. The needle driver holds the needle, the assistant cuts the suture. The stapler is
fired, the anastomosis is tested. The omentum is adherent to the abdominal wall. Which phase of the
operation is shown? Which organ is operated on? Which instrument is used by the left hand, and what is it
doing? Is the tool idle, grasping, cutting, clipping, retracting, coagulating, cauterising or looping?
Where is the lesion: upper left, upper right, lower left, lower right, centre? How many findings,
instruments, polyps are there in the image? None, one, two, three, four, five, six or more. What is the
size of the lesion: less than 5 mm, 5 to 10 mm, 11 to 20 mm, more than 20 mm? What colour is the
abnormality: pink, red, white, yellow, brown, black, blue, green, grey, pale? Is there text in the image?
Is there a green or black box artefact? Have all polyps been removed? Is this easy to detect? What type of
procedure is the image taken from: gastroscopy, colonoscopy, capsule endoscopy, cholecystectomy,
nephrectomy? prograsp forceps, monopolar curved scissors, large needle driver, bipolar forceps, suction,
ultrasound probe, kidney. left, right, top, bottom, open, closed, clear, smoky, dark, orange, yes, no, 0 1
2 3 4 5 6 7 8 9.
"""
"""What the tokenizer learns from, beside the demo's own questions."""

_GENERATION = {
    "qwen2_vl": {"repetition_penalty": 1.0, "temperature": 0.01, "top_k": 1, "top_p": 0.001},
    "qwen3_vl": {"repetition_penalty": 1.0, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
}


def write_tiny_model(name: str, folder: Path) -> Path:
    """Write the model folder of one of TINY_MODELS and return it; one already there is left as it is."""
    if name not in TINY_MODELS:
        raise ValueError(f"{name!r} is not a tiny model; known: {', '.join(TINY_MODELS)}")
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    family = name.removeprefix("tiny-").replace("-", "_")
    template = Path(__file__).with_name(f"{family}.jinja").read_text(encoding="utf-8")
    tokenizer, ids = _tokenizer()
    files = {
        "config.json": _config(family, ids),
        "generation_config.json": {
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": True,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            **_GENERATION[family],
        },
        "preprocessor_config.json": _image_processor(family),
        "tokenizer_config.json": _tokenizer_config(family, ids, template),
        "chat_template.json": {"chat_template": template},
    }
    with scenes.staged(folder, last="config.json") as staging:
        (staging / "tokenizer.json").write_text(tokenizer, encoding="utf-8", newline="\n")
        for file, content in files.items():
            (staging / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")
    return folder


def _corpus() -> list[str]:
    """Lines to learn from; the demo's questions weigh most, so that each of their words is one token."""
    demo = {
        f"{text}\n"
        for index in range(200)
        for row in scenes.rows(0, index)
        for text in (row["question"], row["answer"])
    }
    chat = ["system\nuser\nassistant\n"]
    return (sorted(demo) + chat) * 40 + CORPUS.split("\n")


def _tokenizer() -> tuple[str, dict[str, int]]:
    """A byte-level BPE built as Qwen's is: the text of its tokenizer.json, and the ids of all tokens."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    return tokenizer.to_str(pretty=True), tokenizer.get_vocab(with_added_tokens=True)


def _tokenizer_config(family: str, ids: dict[str, int], template: str) -> dict[str, Any]:
    added = {
        str(ids[token]): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIAL_TOKENS
    }
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "padding_side": "left" if family == "qwen2_vl" else "right",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _image_processor(family: str) -> dict[str, Any]:
    if family == "qwen2_vl":
        return {
            "min_pixels": 56 * 56,
            "max_pixels": 14 * 14 * 4 * 16384,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
        }
    return {
        "size": {"longest_edge": 16 * 16 * 4 * 16384, "shortest_edge": 16 * 16 * 4 * 64},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }


def _config(family: str, ids: dict[str, int]) -> dict[str, Any]:
    """Key for key as Qwen's own files: flat for Qwen2-VL, with a text_config for Qwen3-VL."""
    vision_ids = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    text = {
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.09,
        "intermediate_size": 256,
        "max_position_embeddings": 4096,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "use_cache": True,
        "vocab_size": -(-len(ids) // 64) * 64,  # rounded up, as Qwen's is
    }
    if family == "qwen2_vl":
        return {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "model_type": "qwen2_vl",
            **text,
            **vision_ids,
            "vision_token_id": ids["<|vision_pad|>"],
            "tie_word_embeddings": True,
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
            "vision_config": {
                "depth": 2,
                "embed_dim": 64,
                "mlp_ratio": 3,
                "num_heads": 2,
                "in_chans": 3,
                "hidden_size": text["hidden_size"],
                "initializer_range": 0.09,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "spatial_patch_size": 14,
                "temporal_patch_size": 2,
            },
        }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        **vision_ids,
        "tie_word_embeddings": True,
        "text_config": {
            "attention_bias": False,
            **text,
            "head_dim": 32,
            "model_type": "qwen3_vl_text",
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "deepstack_visual_indexes": [0],
            "depth": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 64,
            "in_channels": 3,
            "initializer_range": 0.09,
            "intermediate_size": 192,
            "model_type": "qwen3_vl",
            "num_heads": 2,
            "num_position_embeddings": 64,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }
