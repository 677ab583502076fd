// Runs the model of this folder with ONNX Runtime:
//
//   runner in.npz out.npz [--model FILE] [--provider NAME] [--threads N]     outputs for one set of inputs
//   runner in.npz --bench SECONDS [...]                                      one line of JSON: times of one run
//
// Keys of in.npz are names of inputs; out.npz gets an array for each output. Needs ONNX Runtime and nothing else.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "npz.h"
#include "settings.h"  // MODEL, PROVIDER, RUNTIME_OPTIMIZATIONS: written when the bundle was made

#ifdef __ANDROID__
// Declared in nnapi_provider_factory.h, which not every package ships.
extern "C" OrtStatus* OrtSessionOptionsAppendExecutionProvider_Nnapi(OrtSessionOptions* options, uint32_t flags);
#endif

namespace {

struct Arguments {
  std::string input, output, model = MODEL, provider = PROVIDER;
  int threads = 1;
  double bench = 0;
};

struct Usage : std::runtime_error {
  using std::runtime_error::runtime_error;
};

Arguments parse(int argc, char** argv) {
  Arguments given;
  std::vector<std::string> files;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word.rfind("--", 0) != 0) {
      files.push_back(word);
      continue;
    }
    if (i + 1 == argc) throw Usage(word + " wants a value");
    const std::string value = argv[++i];
    if (word == "--model") {
      given.model = value;
    } else if (word == "--provider") {
      given.provider = value;
    } else if (word == "--threads") {
      given.threads = std::atoi(value.c_str());
    } else if (word == "--bench") {
      given.bench = std::atof(value.c_str());
    } else {
      throw Usage("unknown option " + word);
    }
  }
  if (files.size() != (given.bench > 0 ? 1u : 2u) || given.threads < 1) {
    throw Usage("usage: runner in.npz out.npz [--model FILE] [--provider NAME] [--threads N] | runner in.npz --bench SECONDS");
  }
  given.input = files[0];
  if (files.size() == 2) given.output = files[1];
  return given;
}

const std::map<std::string, ONNXTensorElementDataType>& types() {
  static const std::map<std::string, ONNXTensorElementDataType> known = {
      {"f4", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},  {"f8", ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE},
      {"f2", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16}, {"b1", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL},
      {"i1", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8},   {"u1", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8},
      {"i2", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16},  {"u2", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16},
      {"i4", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},  {"u4", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32},
      {"i8", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},  {"u8", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64}};
  return known;
}

std::string type_name(ONNXTensorElementDataType type) {
  for (const auto& [name, known] : types()) {
    if (known == type) return name;
  }
  return "another type";
}

// "CPU" for ONNX Runtime's own kernels alone; what a provider does not take runs on these in any case.
void choose(Ort::SessionOptions& options, const std::string& provider, int threads) {
  if (provider == "CPU") return;
  if (provider == "NNAPI") {
#ifdef __ANDROID__
    Ort::ThrowOnError(OrtSessionOptionsAppendExecutionProvider_Nnapi(options, 0));
    return;
#else
    throw std::runtime_error("NNAPI is on Android alone; --provider CPU runs the same file here");
#endif
  }
  std::unordered_map<std::string, std::string> settings;
  if (provider == "XNNPACK") {
    settings["intra_op_num_threads"] = std::to_string(threads);
    // It has threads of its own: two pools that spin wait for each other.
    options.AddConfigEntry("session.intra_op.allow_spinning", "0");
    options.SetIntraOpNumThreads(1);
  } else if (provider == "CoreML") {
    settings["ModelFormat"] = "MLProgram";
    settings["RequireStaticInputShapes"] = "1";
  } else if (provider == "QNN") {
    settings["backend_path"] = "libQnnHtp.so";
  }
  options.AppendExecutionProvider(provider, settings);
}

std::vector<Ort::Value> feed(const Ort::Session& session, npz::Arrays& arrays, std::vector<std::string>& names) {
  Ort::AllocatorWithDefaultOptions allocator;
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<Ort::Value> values;
  for (size_t i = 0; i < session.GetInputCount(); ++i) {
    const std::string name = session.GetInputNameAllocated(i, allocator).get();
    const auto found = arrays.find(name);
    if (found == arrays.end()) throw std::runtime_error("no array '" + name + "', which is an input of the model");
    npz::Array& array = found->second;
    const auto type = session.GetInputTypeInfo(i);
    const auto info = type.GetTensorTypeAndShapeInfo();
    if (types().at(array.type) != info.GetElementType()) {
      throw std::runtime_error("input '" + name + "' has type " + array.type + ", the model wants " + type_name(info.GetElementType()));
    }
    const std::vector<int64_t> wanted = info.GetShape();
    bool fits = wanted.size() == array.shape.size();
    for (size_t axis = 0; fits && axis < wanted.size(); ++axis) fits = wanted[axis] < 0 || wanted[axis] == array.shape[axis];
    if (!fits) throw std::runtime_error("input '" + name + "' has another shape than the model's");
    names.push_back(name);
    values.push_back(Ort::Value::CreateTensor(
        memory, array.data.data(), array.data.size(), array.shape.data(), array.shape.size(), info.GetElementType()));
  }
  return values;
}

npz::Array as_array(const Ort::Value& value, const std::string& name) {
  if (!value.IsTensor()) throw std::runtime_error("output '" + name + "' is no tensor");
  const auto info = value.GetTensorTypeAndShapeInfo();
  npz::Array array;
  array.type = type_name(info.GetElementType());
  array.shape = info.GetShape();
  const size_t width = npz::detail::width_of(array.type);
  if (!width) throw std::runtime_error("output '" + name + "' has a type that .npz files do not hold");
  const char* data = static_cast<const char*>(value.GetTensorRawData());
  array.data.assign(data, data + array.count() * width);
  return array;
}

void print_times(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  const auto at = [&times](double share) { return times[static_cast<size_t>(share * static_cast<double>(times.size() - 1))]; };
  std::cout << "{\"median_ms\": " << at(0.5) << ", \"low_ms\": " << at(0.25) << ", \"high_ms\": " << at(0.75)
            << ", \"runs\": " << times.size() << "}" << std::endl;
}

void run(const Arguments& given) {
  npz::Arrays arrays;
  try {
    arrays = npz::read(given.input);
  } catch (const npz::Error& error) {
    throw std::runtime_error(given.input + ": " + error.what());
  }
  Ort::Env environment(ORT_LOGGING_LEVEL_WARNING, "runner");
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(given.threads);
  if (RUNTIME_OPTIMIZATIONS) options.AddConfigEntry("session.enable_saved_runtime_optimizations", "1");
  choose(options, given.provider, given.threads);
  Ort::Session session(environment, given.model.c_str(), options);
  std::vector<std::string> names, output_names;
  std::vector<Ort::Value> inputs = feed(session, arrays, names);
  Ort::AllocatorWithDefaultOptions allocator;
  for (size_t i = 0; i < session.GetOutputCount(); ++i) output_names.push_back(session.GetOutputNameAllocated(i, allocator).get());
  std::vector<const char*> in, out;
  for (const std::string& name : names) in.push_back(name.c_str());
  for (const std::string& name : output_names) out.push_back(name.c_str());
  const auto once = [&] { return session.Run(Ort::RunOptions{nullptr}, in.data(), inputs.data(), in.size(), out.data(), out.size()); };
  std::vector<Ort::Value> results = once();
  if (given.bench > 0) {
    using Clock = std::chrono::steady_clock;
    for (int i = 0; i < 4; ++i) once();
    std::vector<double> times;
    for (const auto start = Clock::now(); times.size() < 10 || std::chrono::duration<double>(Clock::now() - start).count() < given.bench;) {
      const auto begin = Clock::now();
      once();
      times.push_back(std::chrono::duration<double, std::milli>(Clock::now() - begin).count());
    }
    print_times(times);
    return;
  }
  npz::Arrays found;
  for (size_t i = 0; i < results.size(); ++i) found[output_names[i]] = as_array(results[i], output_names[i]);
  try {
    npz::write(given.output, found);
  } catch (const npz::Error& error) {
    throw std::runtime_error(given.output + ": " + error.what());
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
  } catch (const Usage& error) {
    std::cerr << error.what() << std::endl;
    return 2;
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 1;
  }
  return 0;
}
