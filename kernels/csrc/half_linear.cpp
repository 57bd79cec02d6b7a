// Linear layers of bf16 and float16 where the CPU multiplies neither.
#include "half_product.h"

// out [tokens, N] = x [tokens, K] . weight [N, K] transposed + bias [N]; type 0 is fp32, 1 bf16, 2 float16.
extern "C" void thresher_half_linear(const void* x, int type, int64_t tokens, int64_t K, int64_t N, const void* weight,
                                     const void* bias, void* out, int threads) {
    if (type == 0)
        half_product((const float*)x, tokens, K, N, (const float*)weight, (const float*)bias, (float*)out, threads);
    else if (type == 1)
        half_product((const bf16*)x, tokens, K, N, (const bf16*)weight, (const bf16*)bias, (bf16*)out, threads);
    else
        half_product((const Half*)x, tokens, K, N, (const Half*)weight, (const Half*)bias, (Half*)out, threads);
}
