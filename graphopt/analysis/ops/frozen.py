"""Operators that nothing can be removed around, each with the reason.

With the rules of this package the table covers every operator of ONNX from opset 7 on, and of ONNX Runtime's own domain
those that its tools write. What stands in neither freezes too, and is called an operator without a rule.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.analysis.rules import Labeller, OpRule, rule, where

_EVERY = "its result depends on every element"
_RANDOM = "random numbers are drawn for every element"
_SEQUENCE = "units are not followed through sequences and optional values (fold resolves lists of fixed length)"
_TEXT = "it reads text"
_CLASSES = "all classes are judged together"
_BOXES = "boxes are compared with each other"
_INDICES = "its indices count every element"
_QUANTIZED = "it quantises all heads together"
_CACHE = "its cache of keys and values has a full size"
_PACKED = "tokens of all samples are packed, with offsets that the graph computes"
_ORDERED = "its tiles have a fixed layout"
_DECODING = "it runs a whole decoding loop"
_STATE = "its state couples all positions of a head"
_BLOCKS = "its weights are packed in blocks"
_SPECTRUM = "a transform mixes all positions"
_ELSEWHERE = "it has no kernel on the CPU, where units are proved"

REASONS: dict[str, str] = {
    "NonZero": _EVERY,
    "Unique": "equal elements are found among all",
    "OneHot": "its indices name positions of the new axis",
    "EyeLike": "its result is as large as its input",
    "NonMaxSuppression": _BOXES,
    "Bernoulli": _RANDOM,
    "Multinomial": _RANDOM,
    "RandomNormalLike": _RANDOM,
    "RandomUniformLike": _RANDOM,
    "STFT": _SPECTRUM,
    "Det": "a determinant mixes rows and columns",
    "MaxUnpool": _INDICES,
    "AffineGrid": "coordinates are no units",
    "BitCast": "elements are read as others of another size",
    "SoftmaxCrossEntropyLoss": _CLASSES,
    "NegativeLogLikelihoodLoss": _CLASSES,
    "LinearAttention": _STATE,
    "CausalConvWithState": "its state holds every channel",
    "TfIdfVectorizer": "counts words by their index",
    "ImageDecoder": "it reads a file",
    "StringConcat": _TEXT,
    "StringNormalizer": _TEXT,
    "StringSplit": _TEXT,
    "RegexFullMatch": _TEXT,
    "ConcatFromSequence": _SEQUENCE,
    "Optional": _SEQUENCE,
    "OptionalGetElement": _SEQUENCE,
    "OptionalHasElement": _SEQUENCE,
    "SequenceAt": _SEQUENCE,
    "SequenceConstruct": _SEQUENCE,
    "SequenceEmpty": _SEQUENCE,
    "SequenceErase": _SEQUENCE,
    "SequenceInsert": _SEQUENCE,
    "SequenceLength": _SEQUENCE,
    "SequenceMap": _SEQUENCE,
    "SplitToSequence": _SEQUENCE,
}
"""Operators of ONNX."""

MICROSOFT: dict[str, str] = {
    "BeamSearch": _DECODING,
    "GreedySearch": _DECODING,
    "Sampling": _DECODING,
    "WhisperBeamSearch": _DECODING,
    "BiasAdd": _ELSEWHERE,
    "BiasDropout": _ELSEWHERE,
    "BiasSplitGelu": _ELSEWHERE,
    "BiasSoftmax": "all positions of the axis are judged together",
    "BifurcationDetector": "it compares tokens",
    "NGramRepeatBlock": "it compares tokens",
    "CDist": "distances mix all positions",
    "ComplexMul": "real and imaginary parts are neighbours",
    "ComplexMulConj": "real and imaginary parts are neighbours",
    "ConvTransposeWithDynamicPads": "its pads are computed",
    "CropAndResize": "regions are no units",
    "DecoderAttention": _CACHE,
    "DecoderMaskedMultiHeadAttention": _CACHE,
    "DecoderMaskedSelfAttention": _CACHE,
    "PagedAttention": _CACHE,
    "SparseAttention": "blocks of its scores are told by the graph",
    "LongformerAttention": "its weights of global tokens stand apart",
    "LinearAttention": _STATE,
    "PackedAttention": _PACKED,
    "PackedMultiHeadAttention": _PACKED,
    "RemovePadding": _PACKED,
    "RestorePadding": _PACKED,
    "QAttention": _QUANTIZED,
    "QOrderedAttention": _ORDERED,
    "QOrderedGelu": _ORDERED,
    "QOrderedLayerNormalization": _ORDERED,
    "QOrderedLongformerAttention": _ORDERED,
    "QOrderedMatMul": _ORDERED,
    "QuantizeWithOrder": _ORDERED,
    "DequantizeWithOrder": _ORDERED,
    "QuantizeBFP": _BLOCKS,
    "DequantizeBFP": _BLOCKS,
    "MatMulBnb4": _BLOCKS,
    "MatMulFpQ4": _BLOCKS,
    "GatherBlockQuantized": _BLOCKS,
    "QMoE": _BLOCKS,
    "DynamicQuantizeLSTM": "its gates are quantised together",
    "AttnLSTM": _STATE,
    "QEmbedLayerNormalization": "all positions of the axis are normalised together",
    "GroupNorm": _ELSEWHERE,
    "SkipGroupNorm": _ELSEWHERE,
    "GatedRelativePositionBias": "it mixes the positions of a head",
    "GemmaRotaryEmbedding": _ELSEWHERE,
    "Inverse": "an inverse mixes rows and columns",
    "Irfft": _SPECTRUM,
    "Rfft": _SPECTRUM,
    "MoE": "an expert is chosen among all",
    "NhwcConv": _ELSEWHERE,
    "NhwcFusedConv": _ELSEWHERE,
    "NhwcMaxPool": "it is quantised, with channels last",
    "QLinearReduceMean": "a mean of integers is rounded",
    "QLinearSoftmax": "all positions of the axis are judged together",
    "QLinearWhere": "the parts that it joins have scales of their own",
    "RelativePositionBias": "positions are compared with each other",
    "Tokenizer": _TEXT,
    "Unique": "equal elements are found among all",
    "UnfoldTensor": "windows of an axis overlap",
    "WordConvEmbedding": _TEXT,
    "EPContext": "it is compiled for a device",
}
"""Operators of com.microsoft."""


def reason(domain: str, name: str) -> str:
    """Why nothing can be removed around an operator of this table."""
    return (MICROSOFT if domain == "com.microsoft" else REASONS)[name]


class _Frozen(OpRule):
    """Everything that the operator touches stays."""

    def label(self, node: ir.Node, g: Labeller) -> None:
        g.freeze_node(node, f"{where(node)}: {reason(node.domain, node.op_type)}")


@rule
class Frozen(_Frozen):
    """Operators of ONNX."""

    ops = tuple(REASONS)


@rule
class MicrosoftFrozen(_Frozen):
    """Operators of ONNX Runtime's own domain."""

    ops = tuple(MICROSOFT)
    domain = "com.microsoft"
