// Residual quantisation: with r_0 = z, stage q takes the code e_q nearest to r_q, and r_{q+1} = r_q - e_q. The result
// is the sum of all e_q.
//
// Each stage is a call of `nearest_code`, which subtracts a row's code as soon as it knows it, while the row is in the
// first-level cache. The residuals of all stages have one place in memory; the first stage reads z where it is.
#include "cpu/residual_quantize.h"

#include "cpu/dtype.h"
#include "cpu/workspace.h"

namespace genfast {

void residual_quantize(const ResidualArgs& a) {
  NearestArgs stage = a.stage;
  const int64_t rows = stage.batch * stage.length * stage.groups;
  const Floats residual(a.stages.size() > 1 ? rows * stage.size : 0);
  for (const StageCodes& book : a.stages) {
    stage.first = &book == &a.stages.front();
    stage.residual = &book == &a.stages.back() ? nullptr : residual.data();
    stage.codes = book.codes, stage.codes_dtype = book.dtype, stage.count = book.count;
    stage.codes_group_stride = book.group_stride, stage.code_stride = book.code_stride;
    nearest_code(stage);
    stage.z = reinterpret_cast<const char*>(residual.data());
    stage.z_dtype = kFloat32;
    stage.number_stride = 1, stage.z_group_stride = stage.size;
    stage.row_stride = stage.groups * stage.size, stage.batch_stride = stage.length * stage.row_stride;
    stage.indices += rows;
    if (stage.errors) stage.errors += rows;
  }
}

}  // namespace genfast
