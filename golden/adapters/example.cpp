// A complete subject for Leadline in one file of C++17: rmsnorm, forward and backward, and the forward of router.noaux_tc.
//
//     g++ -std=c++17 -O2 -o example example.cpp && leadline smoke exec:./example && leadline verify exec:./example
//
// It speaks leadline.exec/1: a JSON object a line on standard input, one a line back on standard output, arrays in safetensors files. Put
// your own ops in `run`, and say in `describe` what you have. With -DBUG the router has a bug that real ones had, for you to see it named.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <limits>
#include <map>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// JSON: values, and what reads them.

struct Json {
    enum Kind { null, boolean, number, text, list, object } kind = null;
    double value = 0;  // of a boolean, too
    std::string string;
    std::vector<Json> items;
    std::map<std::string, Json> members;

    const Json &operator[](const std::string &name) const {
        auto found = members.find(name);
        if (found == members.end()) throw std::runtime_error("there is no " + name);
        return found->second;
    }
};

class Parser {
    const std::string &source;
    size_t at = 0;

    char next() {
        while (at < source.size() && std::strchr(" \t\r\n", source[at])) at++;
        return at < source.size() ? source[at] : '\0';
    }

    void expect(char c) {
        if (next() != c) throw std::runtime_error(std::string("expected ") + c + " in JSON");
        at++;
    }

    std::string string() {
        std::string result;
        expect('"');
        while (at < source.size() && source[at] != '"') {
            if (source[at] != '\\') {
                result += source[at++];
                continue;
            }
            const std::string escapes = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
            char c = source.at(at + 1);
            at += 2;
            if (c != 'u') {
                result += meant.at(escapes.find(c));
                continue;
            }
            unsigned code = std::stoul(source.substr(at, 4), nullptr, 16);  // outside ASCII; pairs of surrogates are not read here
            at += 4;
            if (code < 0x80) {
                result += char(code);
            } else if (code < 0x800) {
                result += {char(0xC0 | code >> 6), char(0x80 | (code & 0x3F))};
            } else {
                result += {char(0xE0 | code >> 12), char(0x80 | (code >> 6 & 0x3F)), char(0x80 | (code & 0x3F))};
            }
        }
        expect('"');
        return result;
    }

    bool word(const char *text) {
        bool here = source.compare(at, std::strlen(text), text) == 0;
        if (here) at += std::strlen(text);
        return here;
    }

public:
    explicit Parser(const std::string &text) : source(text) {}

    Json parse() {
        Json result;
        switch (next()) {
        case '{':
            result.kind = Json::object;
            for (expect('{'); next() != '}';) {
                std::string name = string();
                expect(':');
                result.members[name] = parse();
                if (next() != '}') expect(',');
            }
            at++;
            return result;
        case '[':
            result.kind = Json::list;
            for (expect('['); next() != ']';) {
                result.items.push_back(parse());
                if (next() != ']') expect(',');
            }
            at++;
            return result;
        case '"':
            result.kind = Json::text;
            result.string = string();
            return result;
        }
        if (word("true") || word("false")) {
            result.kind = Json::boolean;
            result.value = source[at - 2] == 'u';  // trUe
        } else if (!word("null")) {
            result.kind = Json::number;
            size_t length = 0;
            result.value = std::stod(source.substr(at, 40), &length);
            at += length;
        }
        return result;
    }
};

std::string quoted(const std::string &text) {
    std::string result = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') result += '\\';
        result += c == '\n' ? ' ' : c;
    }
    return result + '"';
}

// Arrays, and safetensors: 8 bytes of length, a JSON header, the data.

struct Array {
    std::string dtype;  // F64, F32, BF16 or I64
    std::vector<int64_t> shape;
    std::vector<double> values;  // double holds all of these

    size_t rows() const { return shape.size() > 1 ? shape[0] : 1; }
    size_t columns() const { return shape.back(); }
};

using Arrays = std::map<std::string, Array>;

template <class T>
T read_as(const char *bytes) {
    T result;
    std::memcpy(&result, bytes, sizeof result);
    return result;
}

template <class T>
void append(std::string &bytes, T value) {
    bytes.append(reinterpret_cast<const char *>(&value), sizeof value);
}

size_t size_of(const std::string &dtype) {
    if (dtype == "F64" || dtype == "I64") return 8;
    if (dtype == "F32") return 4;
    if (dtype == "BF16") return 2;
    throw std::runtime_error("dtype " + dtype + " is not read here");
}

double decode(const std::string &dtype, const char *bytes) {
    if (dtype == "F64") return read_as<double>(bytes);
    if (dtype == "I64") return double(read_as<int64_t>(bytes));
    if (dtype == "F32") return read_as<float>(bytes);
    uint32_t bits = uint32_t(read_as<uint16_t>(bytes)) << 16;  // BF16 is the upper half of F32
    return read_as<float>(reinterpret_cast<const char *>(&bits));
}

uint16_t to_bf16(double value) {
    float narrow = float(value);  // this rounding and the next could meet in a tie, once in 2^16 results
    uint32_t bits = read_as<uint32_t>(reinterpret_cast<const char *>(&narrow));
    if (std::isnan(narrow)) return 0x7FC0;
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

void encode(std::string &bytes, const std::string &dtype, double value) {
    if (dtype == "F64") append(bytes, value);
    else if (dtype == "I64") append(bytes, int64_t(value));
    else if (dtype == "F32") append(bytes, float(value));
    else append(bytes, to_bf16(value));
}

Arrays read(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    std::string bytes{std::istreambuf_iterator<char>(file), {}};
    if (bytes.size() < 8) throw std::runtime_error("cannot read " + path);
    size_t length = read_as<uint64_t>(bytes.data());
    std::string header = bytes.substr(8, length);
    Arrays result;
    for (const auto &[name, about] : Parser(header).parse().members) {
        if (name == "__metadata__") continue;
        Array &array = result[name];
        array.dtype = about["dtype"].string;
        size_t count = 1, size = size_of(array.dtype);
        for (const Json &n : about["shape"].items) {
            array.shape.push_back(int64_t(n.value));
            count *= size_t(n.value);
        }
        size_t start = 8 + length + size_t(about["data_offsets"].items.at(0).value);
        if (start + count * size > bytes.size()) throw std::runtime_error(name + " is cut off");
        for (size_t i = 0; i < count; i++) array.values.push_back(decode(array.dtype, &bytes[start + i * size]));
    }
    return result;
}

void write(const std::string &path, const Arrays &arrays) {
    std::ostringstream header;
    std::string data;
    for (const auto &[name, array] : arrays) {
        header << (data.empty() ? "{" : ",") << quoted(name) << ":{\"dtype\":" << quoted(array.dtype) << ",\"shape\":[";
        for (size_t i = 0; i < array.shape.size(); i++) header << (i ? "," : "") << array.shape[i];
        header << "],\"data_offsets\":[" << data.size() << ",";
        for (double value : array.values) encode(data, array.dtype, value);
        header << data.size() << "]}";
    }
    std::string text = header.str() + "}";
    std::ofstream file(path, std::ios::binary);
    uint64_t length = text.size();
    file.write(reinterpret_cast<const char *>(&length), 8) << text << data;
    if (!file) throw std::runtime_error("cannot write " + path);
}

Array like(const Array &other) { return {other.dtype, other.shape, std::vector<double>(other.values.size())}; }

// The ops. Sums are in double, results are rounded once, when they are written.

double rstd(const Array &x, size_t row, double eps) {
    double sum = 0;
    for (size_t j = 0; j < x.columns(); j++) sum += x.values[row * x.columns() + j] * x.values[row * x.columns() + j];
    return 1 / std::sqrt(sum / double(x.columns()) + eps);
}

// y[n,d] = weight[d] x[n,d] rstd[n],   rstd[n] = (mean_d x[n,d]² + eps)^(-1/2)
Arrays rmsnorm(const Arrays &in, const Json &attrs) {
    const Array &x = in.at("x"), &weight = in.at("weight");
    Array y = like(x);
    for (size_t i = 0; i < x.rows(); i++) {
        double r = rstd(x, i, attrs["eps"].value);
        for (size_t j = 0; j < x.columns(); j++) y.values[i * x.columns() + j] = weight.values[j] * x.values[i * x.columns() + j] * r;
    }
    return {{"y", y}};
}

// With xhat = x rstd and g = dy weight:   dx[n,d] = rstd[n] (g - xhat mean_d(g xhat)),   dweight[d] = Σ_n dy xhat
Arrays rmsnorm_backward(const Arrays &in, const Json &attrs) {
    const Array &x = in.at("x"), &weight = in.at("weight"), &dy = in.at("dy");
    Array dx = like(x), dweight = like(weight);
    for (size_t i = 0; i < x.rows(); i++) {
        double r = rstd(x, i, attrs["eps"].value), mean = 0;
        size_t row = i * x.columns();
        for (size_t j = 0; j < x.columns(); j++) {
            double xhat = x.values[row + j] * r;
            mean += dy.values[row + j] * weight.values[j] * xhat / double(x.columns());
            dweight.values[j] += dy.values[row + j] * xhat;
        }
        for (size_t j = 0; j < x.columns(); j++)
            dx.values[row + j] = r * (dy.values[row + j] * weight.values[j] - x.values[row + j] * r * mean);
    }
    return {{"dx", dx}, {"dweight", dweight}};
}

// The places of the `count` largest, in descending order; the lowest place wins a tie.
std::vector<size_t> largest(const std::vector<double> &values, size_t count) {
    std::vector<size_t> order(values.size());
    std::iota(order.begin(), order.end(), size_t(0));
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return values[a] > values[b]; });
    order.resize(count);
    return order;
}

// topk_idx[n,k] = Topk(s + bias in the best groups),   topk_weight[n,k] = factor s[n,idx] / (Σ_k s[n,idx] + eps),   s = sigmoid(logits)
Arrays router(const Arrays &in, const Json &attrs) {
    const Array &logits = in.at("logits"), &bias = in.at("bias");
    const size_t n = logits.rows(), e = logits.columns(), k = size_t(attrs["k"].value);
    const size_t groups = size_t(attrs["n_group"].value), kept = size_t(attrs["topk_group"].value), width = e / groups;
#ifdef BUG
    const double masked = 0;  // where all s + bias are below 0, a masked expert wins
#else
    const double masked = -std::numeric_limits<double>::infinity();
#endif
    Array idx{"I64", {int64_t(n), int64_t(k)}, {}}, weight{logits.dtype, idx.shape, {}};
    for (size_t i = 0; i < n; i++) {
        std::vector<double> s(e), t(e);
        for (size_t j = 0; j < e; j++) {
            s[j] = 1 / (1 + std::exp(-logits.values[i * e + j]));
            t[j] = s[j] + bias.values[j];  // the bias chooses; it never weighs
        }
        if (groups > 1) {
            std::vector<double> score(groups), left(e, masked);
            for (size_t g = 0; g < groups; g++) {  // a group's score: the sum of its two largest
                std::vector<double> group(t.begin() + g * width, t.begin() + (g + 1) * width);
                std::partial_sort(group.begin(), group.begin() + 2, group.end(), std::greater<>());
                score[g] = group[0] + group[1];
            }
            for (size_t g : largest(score, kept)) std::copy_n(t.begin() + g * width, width, left.begin() + g * width);
            t = left;
        }
        std::vector<size_t> chosen = largest(t, k);
        double total = attrs["denominator_eps"].value;
        for (size_t j : chosen) total += s[j];
        for (size_t j : chosen) {
            idx.values.push_back(double(j));
            weight.values.push_back(s[j] / (attrs["norm_topk_prob"].value ? total : 1) * attrs["routed_scaling_factor"].value);
        }
    }
    return {{"topk_idx", idx}, {"topk_weight", weight}};
}

// The protocol.

const char *DESCRIPTION = R"({"ok": true, "ops": {
    "rmsnorm": {"directions": ["forward", "backward"], "attrs": ["eps"], "precisions": ["fp32", "bf16", "fp64"]},
    "router.noaux_tc": {"attrs": ["k", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "denominator_eps"],
                        "precisions": ["fp32", "bf16", "fp64"]}}})";

std::string run(const Json &asked) {
    const std::string op = asked["op"].string + " " + asked["direction"].string;
    const std::map<std::string, Arrays (*)(const Arrays &, const Json &)> have = {
        {"rmsnorm forward", rmsnorm}, {"rmsnorm backward", rmsnorm_backward}, {"router.noaux_tc forward", router}};
    if (!have.count(op)) return R"({"ok": false, "kind": "refused", "error": )" + quoted("there is no " + op) + "}";
    write(asked["outputs"].string, have.at(op)(read(asked["inputs"].string), asked["attrs"]));
    return R"({"ok": true})";
}

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        std::string answer;
        try {
            Json asked = Parser(line).parse();
            const std::string command = asked["command"].string;
            if (command == "stop") return 0;
            if (command == "start") answer = R"({"ok": true, "name": "example.cpp"})";
            else if (command == "describe") answer = DESCRIPTION;
            else if (command == "run") answer = run(asked);
            else answer = R"({"ok": false, "kind": "failed", "error": "unknown command"})";
        } catch (const std::exception &error) {
            answer = R"({"ok": false, "kind": "failed", "error": )" + quoted(error.what()) + "}";
        }
        std::replace(answer.begin(), answer.end(), '\n', ' ');
        std::cout << answer << std::endl;  // flushed: the other side waits for it
    }
}
