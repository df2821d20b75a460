/*
 * Signs are bits, 1 for +1. The bits of a pixel's channels form words, the first channel in the lowest bit, and unused
 * bits are 0. Signs with different bits have the product -1: a sum of C products is C - 2 * (number of different bits).
 */
#ifndef PCNN_WORD_BITS /* 64 bits are faster where each word is counted by an instruction of its own */
#if defined(__POPCNT__) && !defined(__AVX512VPOPCNTDQ__)
#define PCNN_WORD_BITS 64
#else
#define PCNN_WORD_BITS 32
#endif
#endif

#if PCNN_WORD_BITS == 64
typedef uint64_t Word;
#define WORDS wide
#elif PCNN_WORD_BITS == 32
typedef uint32_t Word;
#define WORDS narrow
#else
#error "PCNN_WORD_BITS must be 32 or 64"
#endif

static int words_of(int channels)
{
    return (channels + PCNN_WORD_BITS - 1) / PCNN_WORD_BITS;
}
