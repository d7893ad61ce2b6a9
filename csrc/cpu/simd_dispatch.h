// Compiles the header BLOCKHESS_LOOPS for baseline x86-64, AVX2 and AVX-512. BLOCKHESS_DISPATCH(f(args)) calls the
// version of f for the processor at run time.
//
// Each version has a namespace, BLOCKHESS_NAMESPACE, and the x86-64 microarchitecture level that it may use,
// BLOCKHESS_LEVEL: 1, 3 or 4. With GCC on x86-64 Linux there are three versions. Other compilers and platforms, and
// tests that define BLOCKHESS_ONE_VERSION, compile one, for the instruction set of the compiler's flags.
//
// Guarantees: one build runs on every x86-64 processor. Versions agree to rounding but not to the bit, since the
// compiler contracts a * b + c to a fused multiply-add if the instruction set has one.
//
// BLOCKHESS_LEVEL is needed because before GCC 13 the macros __AVX2__ and __AVX512F__ do not follow the target
// pragmas. These list features, which add to those of the compiler's flags; arch=x86-64-v3 would replace them.
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
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns about its own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#endif

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && !defined(BLOCKHESS_ONE_VERSION)

#define BLOCKHESS_NAMESPACE baseline
#define BLOCKHESS_LEVEL 1
#include BLOCKHESS_LOOPS
#undef BLOCKHESS_NAMESPACE
#undef BLOCKHESS_LEVEL

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,movbe")
#define BLOCKHESS_NAMESPACE avx2
#define BLOCKHESS_LEVEL 3
#include BLOCKHESS_LOOPS
#undef BLOCKHESS_NAMESPACE
#undef BLOCKHESS_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,movbe,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")
#define BLOCKHESS_NAMESPACE avx512
#define BLOCKHESS_LEVEL 4
#include BLOCKHESS_LOOPS
#pragma GCC pop_options

#define BLOCKHESS_DISPATCH(call)                        \
  (__builtin_cpu_supports("x86-64-v4")   ? avx512::call \
   : __builtin_cpu_supports("x86-64-v3") ? avx2::call   \
                                         : baseline::call)

#else

#define BLOCKHESS_NAMESPACE only
#if defined(__AVX512F__)
#define BLOCKHESS_LEVEL 4
#elif defined(__AVX2__) && defined(__FMA__)
#define BLOCKHESS_LEVEL 3
#else
#define BLOCKHESS_LEVEL 1
#endif
#include BLOCKHESS_LOOPS

#define BLOCKHESS_DISPATCH(call) only::call

#endif
