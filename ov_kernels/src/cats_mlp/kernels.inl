// The kernels, written once over a few vector operations. A translation unit of one instruction set defines those
// operations in its own unnamed namespace and then includes this file there, so nothing leaks to other units:
//
//   F, I              vectors of `lanes` floats and of as many 32-bit integers
//   down_tokens       tokens, at most 5, whose sums of Wdown for 4 vectors of columns fit the registers together
//   tile_vectors      vectors of output columns that a prefill step has, for up to 6 tokens
//   tile_sums         sums of a tile that fit the registers beside what else decoding needs
//   f_*, i_*          arithmetic, loads without alignment, f16 and integer conversions
//   i_dot8(a, w, s)   a + products of 8-bit integers by fours; w comes from i_bytes;  i_dot4: of w from 0 to 15
//   i_zip8            fours of bytes from four vectors, as i_dot8 takes them; i_unzip8 undoes its order
//   transpose         lanes x lanes 32-bit words from rows of their own, to dense rows
//
// Where integers end: 128 products of weights as unsigned bytes with one digit are below 2^7 * 2^8 * 2^7 = 2^22; with
// two, 255 times as much, below 2^30. A lane of a span sums 32 of them, a batch at most 16 rows
// of Wdown. So no sum leaves 32 bits.

// Each needs those before.
// clang-format off
#include "cpu/vector_math.inl"
#include "cats_mlp/activations.inl"
#include "cats_mlp/formats.inl"
#include "cats_mlp/tokens.inl"
#include "cats_mlp/dots.inl"
#include "cats_mlp/tiles.inl"
#include "cats_mlp/decode.inl"
#include "cats_mlp/interleave.inl"
#include "cats_mlp/prefill.inl"
#include "cats_mlp/halves.inl"
// clang-format on
