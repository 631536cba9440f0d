// One group of the table with its kernels bound: the compiled form of dks.dispatch.served.Dispatch.
//
//   Counts()                 calls served, by match: read() -> (exact, bin, nearest)
//   Plan(edges, classes, needs, entries, counts)
//     edges: a tuple of upper edges for each dynamic dim; classes: ((alignment, (rule or -1, ...)), ...), largest
//     first; needs: the alignment that each rule's kernel needs; entries: {rule: callable, or None for the
//     framework's own operator}.
//   plan.find(align, *sizes) -> what dks.dispatch.table.find answers
//   plan.drop(rule)          the rule's kernel serves no more
#ifndef DKS_PLAN_HPP
#define DKS_PLAN_HPP

#include <limits>
#include <vector>

#include "kernel.hpp"
#include "lookup.hpp"

namespace dks {

struct Counts {
  std::uint64_t served[3] = {};

  int visit(visitproc, void*) const { return 0; }
  void clear() {}

  static PyObject* create(PyTypeObject* type, PyObject* args, PyObject*) {
    return PyArg_ParseTuple(args, "") ? Object<Counts>::make(type, new (std::nothrow) Counts) : nullptr;
  }

  static PyObject* read(PyObject* self, PyObject*) {
    const Counts& counts = Object<Counts>::of(self);
    return Py_BuildValue("KKK", counts.served[0], counts.served[1], counts.served[2]);
  }
};

// What serves a rule.
struct Entry {
  enum Kind { none, framework, python, native } kind = none;
  Ref call;                        // python, native
  const Kernel* kernel = nullptr;  // native: inside `call`
};

// A whole number outside the type's range becomes its furthest value: the lookup answers both alike, because
// edges end at 2^40 and alignments at 64. False with a Python error where `value` is no whole number.
template <typename Number>
bool parse(PyObject* value, Number& parsed) {
  constexpr long long least = std::numeric_limits<Number>::min();
  constexpr long long most = std::numeric_limits<Number>::max();
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
  if (number == -1 && overflow == 0 && PyErr_Occurred() != nullptr) return false;
  const long long held = overflow > 0 ? most : overflow < 0 ? least : number;
  parsed = static_cast<Number>(held > most ? most : held < least ? least : held);
  return true;
}

template <typename Number>
bool parse_tuple(PyObject* tuple, std::vector<Number>& parsed) {
  if (!PyTuple_Check(tuple)) {
    PyErr_SetString(PyExc_TypeError, "expected a tuple of whole numbers");
    return false;
  }
  parsed.resize(static_cast<std::size_t>(PyTuple_Size(tuple)));
  for (std::size_t i = 0; i < parsed.size(); ++i)
    if (!parse(PyTuple_GetItem(tuple, static_cast<Py_ssize_t>(i)), parsed[i])) return false;
  return true;
}

// Whether a hit is a guess from the nearest evidence there is: Python serves it, and notes its sizes.
inline bool nearest(std::int32_t code) { return (code & 3) == static_cast<std::int32_t>(Match::nearest); }

// The edges of one dynamic dim, and where to look in them: what codegen/cpp.py writes into a header.
struct Axis {
  std::vector<std::int64_t> edges;
  std::vector<std::uint16_t> first;
  std::int32_t count = 0, most = 0;

  // `edges` as they were given, from 1 on and increasing.
  void prepare() {
    count = static_cast<std::int32_t>(edges.size());
    std::vector<std::uint16_t> inside(static_cast<std::size_t>(octave_of(nearest_reach * edges.back()) + 1));
    for (const std::int64_t edge : edges) ++inside[static_cast<std::size_t>(octave_of(edge))];
    std::uint16_t before = 0;
    for (const std::uint16_t here : inside) {
      first.push_back(before);
      before = static_cast<std::uint16_t>(before + here);
      if (here > most) most = here;
    }
    edges.insert(edges.end(), static_cast<std::size_t>(most), std::numeric_limits<std::int64_t>::max());
  }
};

struct Plan {
  std::vector<Axis> held;
  std::vector<Edges> axes;
  std::vector<std::vector<std::int32_t>> cells;
  std::vector<Class> classes;
  std::vector<Rule> rules;
  std::vector<Entry> entries;
  Group group{};
  Ref counts_object;
  Counts* counts = nullptr;

  int visit(visitproc visit, void* arg) const {
    for (const Entry& entry : entries)
      if (const int said = visit_all(visit, arg, entry.call)) return said;
    return visit_all(visit, arg, counts_object);
  }
  void clear() {
    for (Entry& entry : entries) entry = Entry{};
  }

  std::int32_t choose(const std::int64_t* sizes, std::int32_t align) const {
    return find(group, rules.data(), sizes, align);
  }

  const Entry& entry(std::int32_t code) const { return entries[static_cast<std::size_t>(code >> 2)]; }

  static PyTypeObject* type;
  static PyTypeObject* counts_type;
  static PyTypeObject* kernel_type;

  static PyObject* create(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject *edges, *classes, *needs, *entries, *counts;
    if (!PyArg_ParseTuple(args, "O!O!O!O!O!", &PyTuple_Type, &edges, &PyTuple_Type, &classes, &PyTuple_Type, &needs,
                          &PyDict_Type, &entries, counts_type, &counts))
      return nullptr;
    auto* plan = new (std::nothrow) Plan;
    if (plan == nullptr) return PyErr_NoMemory();
    plan->counts_object = Ref::share(counts);
    plan->counts = &Object<Counts>::of(counts);
    if (plan->fill(edges, classes, needs) && plan->bind(entries)) return Object<Plan>::make(type, plan);
    delete plan;
    return nullptr;
  }

  static PyObject* find_python(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    const Plan& plan = Object<Plan>::of(self);
    if (count < 1 || static_cast<std::size_t>(count - 1) != plan.axes.size()) {
      PyErr_Format(PyExc_TypeError, "found %zd sizes, expected %zu", count - 1, plan.axes.size());
      return nullptr;
    }
    std::int32_t align = 0;
    std::int64_t sizes[max_dynamic] = {};
    if (!parse(args[0], align)) return nullptr;
    for (Py_ssize_t dim = 1; dim < count; ++dim)
      if (!parse(args[dim], sizes[dim - 1])) return nullptr;
    return PyLong_FromLong(plan.choose(sizes, align));
  }

  static PyObject* drop(PyObject* self, PyObject* number) {
    Plan& plan = Object<Plan>::of(self);
    std::int32_t rule = -1;
    if (!parse(number, rule)) return nullptr;
    if (rule >= 0 && static_cast<std::size_t>(rule) < plan.entries.size())
      plan.entries[static_cast<std::size_t>(rule)] = Entry{};
    Py_RETURN_NONE;
  }

 private:
  // Shape and cells; `table.py` checked their meaning, so what is checked here is what memory depends on.
  bool fill(PyObject* edge_tuples, PyObject* class_pairs, PyObject* needs) {
    std::vector<std::int32_t> aligns;
    if (!parse_tuple(needs, aligns)) return false;
    for (const std::int32_t align : aligns) rules.push_back({"", align});
    entries.resize(rules.size());
    std::size_t wanted = 1;
    const Py_ssize_t dims = PyTuple_Size(edge_tuples);
    if (dims > max_dynamic) return wrong("too many dims");
    for (Py_ssize_t dim = 0; dim < dims; ++dim) {
      std::vector<std::int64_t> edges;
      if (!parse_tuple(PyTuple_GetItem(edge_tuples, dim), edges)) return false;
      if (!increasing(edges)) return wrong("edges must increase from 1 to 2^40, at most 4096 of them");
      wanted *= edges.size();
      held.emplace_back();
      held.back().edges = std::move(edges);
      held.back().prepare();
    }
    for (const Axis& axis : held) axes.push_back({axis.edges.data(), axis.count, axis.first.data(), axis.most});
    std::vector<std::int32_t> least;
    for (Py_ssize_t i = 0; i < PyTuple_Size(class_pairs); ++i) {
      int align;
      PyObject* given;
      if (!PyArg_ParseTuple(PyTuple_GetItem(class_pairs, i), "iO", &align, &given)) return false;
      least.push_back(align);
      cells.emplace_back();
      if (!parse_tuple(given, cells.back())) return false;
      if (cells.back().size() != wanted) return wrong("a class has another number of cells than there are bins");
      for (const std::int32_t rule : cells.back())
        if (rule < -1 || rule >= static_cast<std::int32_t>(rules.size())) return wrong("a cell names no rule");
    }
    for (std::size_t i = 0; i < cells.size(); ++i) classes.push_back({least[i], cells[i].data()});
    group.edges = axes.data();
    group.dims = static_cast<std::int32_t>(axes.size());
    group.classes = classes.data();
    group.class_count = static_cast<std::int32_t>(classes.size());
    return true;
  }

  bool bind(PyObject* given) {
    PyObject *key, *call;
    Py_ssize_t position = 0;
    while (PyDict_Next(given, &position, &key, &call)) {
      std::int32_t rule = -1;
      if (!parse(key, rule)) return false;
      if (rule < 0 || static_cast<std::size_t>(rule) >= entries.size()) return wrong("an entry has no rule");
      Entry& entry = entries[static_cast<std::size_t>(rule)];
      if (call == Py_None) {
        entry.kind = Entry::framework;
        continue;
      }
      entry.call = Ref::share(call);
      entry.kind = Py_TYPE(call) == kernel_type ? Entry::native : Entry::python;
      if (entry.kind == Entry::native) entry.kernel = &Object<Kernel>::of(call);
    }
    return true;
  }

  static bool increasing(const std::vector<std::int64_t>& edges) {
    std::int64_t last = 0;
    for (const std::int64_t edge : edges)
      if (edge <= std::exchange(last, edge)) return false;
    return last >= 1 && last <= std::int64_t{1} << 40 && edges.size() <= 4096;
  }

  static bool wrong(const char* why) {
    PyErr_SetString(PyExc_ValueError, why);
    return false;
  }
};

inline PyTypeObject* Plan::type = nullptr;
inline PyTypeObject* Plan::counts_type = nullptr;
inline PyTypeObject* Plan::kernel_type = nullptr;

}  // namespace dks

#endif  // DKS_PLAN_HPP
