"""The operators that a program read from a file may call: they compute from their arguments, and do nothing else.

A list of what is allowed, not of what is forbidden: operators with a path (`from_file`, `save`), those that write to
an argument, set something of the process, print, or touch memory by address are not on it, nor is any that torch will
add. Operators of Thresher's own namespace count where they are defined in this process and write to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

_ELEMENTWISE = """
__and__ __or__ __xor__ __lshift__ __rshift__ abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin
arcsinh arctan arctan2 arctanh asin asinh atan atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or
bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min clip copysign cos cosh deg2rad digamma div divide
elu eq erf erfc erfinv exp exp2 expm1 fix float_power floor floor_divide fmax fmin fmod frac gcd ge gelu glu greater
greater_equal gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 igamma igammac isclose isfinite isin
isinf isnan isneginf isposinf isreal lcm ldexp le leaky_relu lerp less less_equal lgamma log log10 log1p log2
log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt masked_fill maximum minimum
mish mul multiply mvlgamma nan_to_num ne neg negative nextafter not_equal polar polygamma positive pow prelu rad2deg
real reciprocal relu relu6 remainder round rrelu rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus
softshrink special_bessel_j0 special_bessel_j1 special_digamma special_entr special_erf special_erfc special_erfcx
special_erfinv special_exp2 special_expit special_expm1 special_gammainc special_gammaincc special_gammaln special_i0
special_i0e special_i1 special_i1e special_log1p special_log_ndtr special_logit special_multigammaln special_ndtr
special_ndtri special_polygamma special_psi special_round special_sinc special_xlog1py special_xlogy special_zeta
sqrt square sub subtract tan tanh threshold true_divide trunc where xlogy conj conj_physical imag isreal complex
view_as_complex view_as_real resolve_conj resolve_neg modf frexp _conj _conj_physical _neg_view
"""
_REDUCTIONS = """
all amax amin aminmax any argmax argmin bincount count_nonzero cummax cummin cumprod cumsum dist equal histc kthvalue
log_softmax logcumsumexp logsumexp max mean median min mode msort nanmean nanmedian nanquantile nansum norm prod
quantile softmax sort argsort special_log_softmax special_logsumexp special_softmax std std_mean sum topk trace var
var_mean trapezoid trapz cumulative_trapezoid diff unique_consecutive unique_dim frobenius_norm nuclear_norm
linalg_norm linalg_vector_norm linalg_matrix_norm _log_softmax _softmax _safe_softmax _is_all_true _is_any_true
hash_tensor
"""
_PRODUCTS = """
addbmm addmm addmv addr baddbmm bilinear bmm chain_matmul conv1d conv2d conv3d conv_tbc conv_transpose1d
conv_transpose2d conv_transpose3d convolution cdist cross dot einsum ger inner kron linalg_cross linalg_matmul
linalg_multi_dot linalg_vecdot linear matmul mm mv outer scaled_dot_product_attention tensordot vdot _grouped_mm
_int_mm _scaled_mm _scaled_grouped_mm _addmm_activation gru gru_cell lstm lstm_cell rnn_relu rnn_relu_cell rnn_tanh
rnn_tanh_cell
"""
_LAYERS = """
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d alpha_dropout avg_pool1d avg_pool2d avg_pool3d batch_norm
channel_shuffle col2im constant_pad_nd cosine_similarity cross_entropy_loss dropout embedding embedding_bag
feature_alpha_dropout feature_dropout group_norm grid_sampler grid_sampler_2d grid_sampler_3d im2col instance_norm
layer_norm max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices
max_unpool2d max_unpool3d native_batch_norm native_dropout native_group_norm native_layer_norm
_native_batch_norm_legit_no_training pad pairwise_distance pixel_shuffle pixel_unshuffle reflection_pad1d
reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d rms_norm _fused_rms_norm
binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss huber_loss kl_div l1_loss
margin_ranking_loss mse_loss nll_loss nll_loss_nd nll_loss2d smooth_l1_loss soft_margin_loss upsample_bicubic2d
upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
_upsample_nearest_exact3d _weight_norm _masked_softmax affine_grid_generator
"""
_SHAPES = """
adjoint alias as_strided atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors broadcast_to cartesian_prod
cat chunk clone column_stack combinations concat concatenate contiguous detach diag diag_embed diagflat diagonal
diagonal_scatter dsplit dstack expand expand_as flatten flip fliplr flipud gather hsplit hstack index index_add
index_copy index_fill index_put index_reduce index_select item lift lift_fresh lift_fresh_copy mH mT masked_scatter
masked_select matrix_H meshgrid moveaxis movedim narrow narrow_copy nonzero nonzero_numpy nonzero_static numpy_T
one_hot pad_sequence permute put ravel repeat repeat_interleave reshape reshape_as roll rot90 row_stack scatter
scatter_add scatter_reduce select select_scatter size slice slice_scatter split split_with_sizes squeeze stack stride
storage_offset sum_to_size swapaxes swapdims sym_is_contiguous sym_numel sym_size sym_storage_offset sym_stride t
take take_along_dim tensor_split tile to transpose tril triu type_as unbind unflatten unfold unsafe_chunk
unsafe_split unsafe_split_with_sizes unsqueeze view view_as vsplit vstack searchsorted bucketize copy fill
as_strided_scatter view_copy expand_copy permute_copy transpose_copy select_copy slice_copy squeeze_copy
unsqueeze_copy t_copy diagonal_copy unbind_copy split_copy split_with_sizes_copy unfold_copy as_strided_copy
alias_copy detach_copy argwhere tensor scalar_tensor numel dim is_nonzero _to_copy _local_scalar_dense _unsafe_index
_unsafe_index_put _unsafe_masked_index _cast_Byte _cast_Char _cast_Double _cast_Float _cast_Half _cast_Int _cast_Long
_cast_Short _shape_as_tensor _is_zerotensor
"""
_MADE = """
arange bartlett_window bernoulli blackman_window empty empty_like empty_permuted empty_strided eye full full_like
hamming_window hann_window kaiser_window linspace logspace multinomial new_empty new_empty_strided new_full new_ones
new_zeros normal normal_functional ones ones_like rand rand_like randint randint_like randn randn_like randperm range
tril_indices triu_indices uniform vander zero zeros zeros_like
"""
_ALGEBRA = """
cholesky cholesky_inverse cholesky_solve corrcoef cov det inverse linalg_cholesky linalg_cholesky_ex linalg_det
linalg_diagonal linalg_eigh linalg_eigvalsh linalg_householder_product linalg_inv linalg_inv_ex linalg_lstsq
linalg_lu linalg_lu_factor linalg_matrix_exp linalg_matrix_power linalg_matrix_rank linalg_pinv linalg_qr
linalg_slogdet linalg_solve linalg_solve_ex linalg_solve_triangular linalg_svd linalg_svdvals linalg_vander logdet
matrix_exp matrix_power pinverse slogdet triangular_solve fft_fft fft_fft2 fft_fftfreq fft_fftn fft_fftshift fft_hfft
fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq
fft_rfftn stft istft
"""
_PRIMS = """
convert_element_type view_of broadcast_in_dim transpose squeeze reshape clone iota where cat collapse_view split_dim
sum amax amin prod xor_sum device_put rsqrt
"""
PURE = {
    "aten": frozenset(" ".join((_ELEMENTWISE, _REDUCTIONS, _PRODUCTS, _LAYERS, _SHAPES, _MADE, _ALGEBRA)).split()),
    "prims": frozenset(_PRIMS.split()),
}  # fmt: skip

# (running_mean, training): they write to the running statistics where the second is true
_TRAINING = {
    "batch_norm": ("running_mean", "training"),
    "native_batch_norm": ("running_mean", "training"),
    "instance_norm": ("running_mean", "use_input_stats"),
}


def refusal(target: Any) -> str | None:
    """Why a file's program may not call this operator, as the end of a sentence that begins with its name; or None."""
    if not isinstance(target, torch._ops.OpOverload):
        return "is no operator"
    if target._schema.is_mutable:
        return "writes to its arguments"
    name = target._schema.name.partition("::")[2]
    allowed = name in PURE.get(target.namespace, ()) or target.namespace == "thresher"
    return None if allowed else "is not on the list of operators that compute and do nothing else"


def call_refusal(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """As `refusal`, for one call: an operator that computes may still write, where an argument tells it to train."""
    known = _TRAINING.get(target._schema.name.partition("::")[2]) if hasattr(target, "_schema") else None
    if known is None:
        return None
    given = dict(zip((a.name for a in target._schema.arguments), args)) | dict(kwargs)
    statistics, training = (given.get(name) for name in known)
    return (
        None if statistics is None or training is False else "writes to its running statistics when it trains"
    )
