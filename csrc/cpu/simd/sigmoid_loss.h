// Interface of the vector kernel of sigmoid_loss.
#pragma once

#include <cstdint>

#include "capability.h"
#include "logit_block.h"

namespace tilewise {

struct SigmoidCoefficients {
  double bias;         // z = scale * dot + bias
  double grad_factor;  // d(dot) = dz * grad_factor
  bool need_grad;      // else only the loss is summed
};

struct SigmoidBlock : MatchedBlock {
  SigmoidCoefficients coefficients;
};

// Sums over a block: loss, dz * dot and dz. Not yet divided by the number of images.
struct SigmoidSums {
  double loss, dz_dot, dz;
};

// grads = d(loss)/d(dot), bfloat16 or of the dots' type, may be where the dots are; not written
// unless gradients are needed.
#define TILEWISE_DECLARE(CAPABILITY)                                                \
  namespace CAPABILITY {                                                            \
  SigmoidSums sigmoid_block(const SigmoidBlock&, void* grads, int64_t grads_stride, \
                            bool bfloat16);                                         \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
