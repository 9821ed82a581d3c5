// Prints, as JSON, kernels with small and large inputs and the text that signature.h makes of them; signature_test.py
// has MLX make the same.
#include <iostream>

#include "emulator/signature.h"

namespace {

using namespace emulator;
namespace metal = turboquant::metal;

std::string quoted(const std::string& s) {
  std::string out = "\"";
  for (char c : s) {
    if (c == '\n') {
      out += "\\n";
    } else {
      if (c == '"' || c == '\\') out += '\\';
      out += c;
    }
  }
  return out + "\"";
}

bool first = true;

// Of two sides; together every kind of codes.
const metal::Coding kCodings[][2] = {{3, 4}, {2, {2, turboquant::Code::trellis}}, {{3, turboquant::Code::trellis}, 8}};

void print(const metal::Kernel& k, const std::vector<InputInfo>& inputs, const std::vector<std::string>& outputs) {
  std::cout << (first ? "[\n" : ",\n") << "{\"name\": " << quoted(k.name) << ", \"source\": " << quoted(k.source);
  first = false;
  std::cout << ", \"inputs\": [";
  for (size_t i = 0; i < inputs.size(); ++i) {
    std::cout << (i ? ", [" : "[") << quoted(k.inputs[i]) << ", " << quoted(inputs[i].type) << ", " << inputs[i].ndim
              << ", " << inputs[i].size << "]";
  }
  std::cout << "], \"outputs\": [";
  for (size_t i = 0; i < outputs.size(); ++i) {
    std::cout << (i ? ", [" : "[") << quoted(k.outputs[i].name) << ", " << quoted(outputs[i]) << "]";
  }
  std::cout << "], \"template\": [";
  for (size_t i = 0; i < k.template_args.size(); ++i) {
    const auto& a = k.template_args[i];
    using Kind = metal::TemplateArg::Kind;
    std::cout << (i ? ", [" : "[") << quoted(a.name) << ", "
              << (a.kind == Kind::dtype     ? quoted(type_name(turboquant::Dtype(a.value)))
                  : a.kind == Kind::boolean ? (a.value ? "true" : "false")
                                            : std::to_string(a.value))
              << "]";
  }
  std::cout << "], \"text\": " << quoted(kernel_text(k, inputs, outputs)) << "}";
}

}  // namespace

int main() {
  using turboquant::Dtype;
  for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
    const std::string t = type_name(dtype);
    for (const auto& codings : kCodings) {
      const std::vector<metal::Coding> both{codings[0], codings[1]};
      const metal::EncodeShape shape{1, 2, 3, 64, both, {true, false}, 1};
      print(metal::encode_kernel(shape),
            {{t, 4, 384}, {"float", 2, 128}, {t, 4, 384}, {"int32_t", 1, 31}, {"int32_t", 1, 31}},
            {"uint32_t", "float16_t", "uint32_t", "float16_t"});
      const metal::EncodeShape shaped{1, 2, 3, 64, both, {true, false}, 1, {false, true}};
      print(metal::encode_kernel(shaped),
            {{t, 4, 384},
             {"float", 2, 128},
             {"int32_t", 1, 31},
             {t, 4, 384},
             {"int32_t", 1, 31},
             {"float16_t", 3, 8192},
             {"int32_t", 1, 31}},
            {"uint32_t", "float16_t", "uint32_t", "float16_t"});
      print(metal::encode_kernel({1, 2, 3, 64, {codings[0]}, {false}, 1, {true}}),
            {{t, 4, 384}, {"int32_t", 1, 31}, {"float16_t", 3, 8192}, {"int32_t", 1, 31}}, {"uint32_t", "float16_t"});
      print(metal::decode_kernel(shape, dtype),
            {{"uint32_t", 4, 36}, {"float16_t", 3, 6}, {"float", 2, 128}, {"int32_t", 1, 31}}, {t});
      for (int query_len : {1, 40, 200}) {
        for (size_t small : {size_t(2), size_t(20)}) {  // of what is passed as `constant` when it is short
          const auto plan = metal::plan_attention({.batch = 2,
                                                   .query_heads = 4,
                                                   .kv_heads = 2,
                                                   .query_len = query_len,
                                                   .kv_len = 600,
                                                   .head_dim = 64,
                                                   .keys = codings[0],
                                                   .values = codings[1],
                                                   .dtype = dtype,
                                                   .splits = query_len == 200 ? 1 : 0,
                                                   .ring = codings[1].bits == 8 ? 64 : 0,
                                                   .recent = codings[1].bits == 8 ? 32 : 0});
          const InputInfo codes{"uint32_t", 4, 4000}, scales{"float16_t", 3, small}, q{t, 4, 1000},
              sinks{"float", 1, small}, centre{"float", 2, 128}, params{"int32_t", 1, 31}, starts{"int32_t", 1, small},
              mask{small == 2 ? "bool" : t, 4, 4800};
          std::vector<InputInfo> inputs{q, codes, scales, codes, scales, starts, mask};
          if (!plan.few_rows) inputs.insert(inputs.end(), {sinks, centre, centre});
          inputs.push_back(params);
          print(plan.attend, inputs,
                plan.merged ? std::vector<std::string>{"float16_t", "float"} : std::vector<std::string>{t});
          if (plan.copies) print(plan.attend_copies, inputs, {"float16_t", "float"});
          if (plan.merged) {
            inputs = {q, {"float16_t", 5, 1000}, {"float", 5, 40}};
            if (plan.copies) inputs.insert(inputs.end(), {{"float16_t", 5, 1000}, {"float", 5, 40}});
            inputs.insert(inputs.end(), {sinks, centre, centre, params});
            print(plan.merge, inputs, {t});
          }
        }
      }
    }
  }
  std::cout << "\n]\n";
}
