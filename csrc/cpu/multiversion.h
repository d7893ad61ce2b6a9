// Code that is compiled for baseline x86-64, AVX2 (x86-64-v3) and AVX-512 (x86-64-v4), and chosen by the processor.
//
// So one build is right everywhere; other compilers and processors take the plain loop. What the versions share must be
// inlined into each of them. The compiler fuses multiplications with additions where the version has the instruction,
// so results of the versions agree to rounding, not to the bit. With BLOCKHESS_ONE_VERSION there is only the one that
// the compiler's flags ask for, so that a test can compare them.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define BLOCKHESS_INLINE inline __attribute__((always_inline))
#if !defined(BLOCKHESS_ONE_VERSION)
#define BLOCKHESS_VERSIONS
// One function in all versions.
#define BLOCKHESS_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#endif
#endif

#if !defined(BLOCKHESS_INLINE)
#define BLOCKHESS_INLINE inline
#endif
#if !defined(BLOCKHESS_MULTIVERSION)
#define BLOCKHESS_MULTIVERSION
#endif
