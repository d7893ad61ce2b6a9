// Includes BLOCKHESS_LOOPS for baseline x86-64, AVX2 and AVX-512, each in a namespace of its own;
// BLOCKHESS_CHOSEN(call) then calls the one for this processor.
//
// So one build is right everywhere; other compilers and processors take what their flags ask for, and so does a test
// that compares them, by BLOCKHESS_ONE_VERSION. The compiler fuses multiplications with additions where there is an
// instruction for it, so results agree to rounding, not to the bit.
//
// The loops see BLOCKHESS_SET, the namespace, and BLOCKHESS_LEVEL, the level of x86-64 that they may use, 1 for any
// processor; before GCC 13 the compiler's own macros do not follow its pragmas. Features are named one by one, since
// they add to those that the compiler's flags give, where a name of a level takes others away.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define BLOCKHESS_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#if defined(__clang__)
#include <immintrin.h>
#else
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#endif

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && !defined(BLOCKHESS_ONE_VERSION)

#define BLOCKHESS_SET baseline
#define BLOCKHESS_LEVEL 1
#include BLOCKHESS_LOOPS
#undef BLOCKHESS_SET
#undef BLOCKHESS_LEVEL

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,movbe")
#define BLOCKHESS_SET avx2
#define BLOCKHESS_LEVEL 3
#include BLOCKHESS_LOOPS
#undef BLOCKHESS_SET
#undef BLOCKHESS_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,movbe,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")
#define BLOCKHESS_SET avx512
#define BLOCKHESS_LEVEL 4
#include BLOCKHESS_LOOPS
#pragma GCC pop_options

#define BLOCKHESS_CHOSEN(call)                          \
  (__builtin_cpu_supports("x86-64-v4")   ? avx512::call \
   : __builtin_cpu_supports("x86-64-v3") ? avx2::call   \
                                         : baseline::call)

#else

#define BLOCKHESS_SET only
#if defined(__AVX512F__)
#define BLOCKHESS_LEVEL 4
#elif defined(__AVX2__) && defined(__FMA__)
#define BLOCKHESS_LEVEL 3
#else
#define BLOCKHESS_LEVEL 1
#endif
#include BLOCKHESS_LOOPS

#define BLOCKHESS_CHOSEN(call) only::call

#endif
