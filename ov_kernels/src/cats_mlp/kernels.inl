// The kernels, written once over a few vector operations. A translation unit of one instruction set defines those
// operations in its own unnamed namespace and then includes this file there, so nothing leaks to other units:
//
//   F, I              vectors of `lanes` floats and of as many 32-bit integers
//   down_tokens       tokens, at most 5, whose sums of Wdown for 4 vectors of columns fit the registers together
//   tile_vectors      vectors of output columns that a prefill tile has, for up to 6 tokens
//   f_*, i_*          arithmetic, loads without alignment, f16 and integer conversions
//   i_dot16(a, x, y)  a + pairwise products of 16-bit integers;  i_dot8(a, u, s): of 8-bit, unsigned by signed, by fours
//   i_zip16           pairs of 16-bit integers from two vectors, as i_dot16 takes them; i_unzip16 undoes its order
//   i_zip8            fours of bytes from four vectors, as i_dot8 takes them; i_unzip8 undoes its order
//   transpose         lanes x lanes 32-bit words from rows of their own, to dense rows
//
// Where integers end: a block of 128 products of 16 and 8 bits is below 2^7 * 2^15 * 2^7 = 2^29, one of 8 and 8 bits below
// 2^7 * 2^8 * 2^7 = 2^22, and a batch of at most 32 rows of Wdown a quarter of either, so no sum leaves 32 bits.

// Each needs those before.
// clang-format off
#include "cpu/vector_math.inl"
#include "cats_mlp/activations.inl"
#include "cats_mlp/formats.inl"
#include "cats_mlp/tokens.inl"
#include "cats_mlp/dots.inl"
#include "cats_mlp/decode.inl"
#include "cats_mlp/interleave.inl"
#include "cats_mlp/prefill.inl"
// clang-format on
