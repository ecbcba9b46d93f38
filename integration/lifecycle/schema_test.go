// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	shop "github.com/cohort-project/cohort/integration/shop/harness"
	"github.com/cohort-project/cohort/oci"
)

// What docs/cli.md documents, for programs: nothing less and nothing more.
type (
	checkpointDocument struct {
		Group    string             `json:"group"`
		Ref      string             `json:"ref"`
		Epoch    string             `json:"epoch"`
		Number   int                `json:"epoch_number"`
		Digest   string             `json:"digest"`
		StopMS   *float64           `json:"stop_ms"`
		SkewMS   *float64           `json:"skew_ms"`
		PhasesMS map[string]float64 `json:"phases_ms"`
		Members  []struct {
			ID           string             `json:"id"`
			Name         string             `json:"name"`
			StopMS       *float64           `json:"stop_ms"`
			Processes    *int               `json:"processes"`
			MemoryBytes  *uint64            `json:"memory_bytes"`
			StorageBytes *uint64            `json:"storage_bytes"`
			Image        string             `json:"image"`
			Digest       string             `json:"digest"`
			ParentEpoch  string             `json:"parent_epoch"`
			Chain        int                `json:"chain"`
			Bytes        int64              `json:"bytes"`
			Increment    int64              `json:"increment_bytes"`
			PartsMS      map[string]float64 `json:"parts_ms"`
			Memory       struct {
				Engine         string `json:"engine"`
				Why            string `json:"why"`
				Rounds         uint32 `json:"rounds"`
				CopiedBytes    uint64 `json:"copied_bytes"`
				End            string `json:"end"`
				BarrierBytes   uint64 `json:"barrier_bytes"`
				PrecopiedBytes uint64 `json:"precopied_bytes"`
				Untracked      uint32 `json:"untracked"`

				Increment            string   `json:"increment"`
				FullWhy              string   `json:"full_why"`
				ParentBytes          uint64   `json:"parent_bytes"`
				SharedPrecopiedBytes uint64   `json:"shared_precopied_bytes"`
				SharedBarrierBytes   uint64   `json:"shared_barrier_bytes"`
				SharedWhy            []string `json:"shared_why"`
			} `json:"memory"`
		} `json:"members"`
		Merge      *mergeDocument    `json:"merge"`
		MergeError string            `json:"merge_error"`
		Preflight  preflightDocument `json:"preflight"`
	}
	preflightDocument struct {
		Findings []struct {
			Severity string `json:"severity"`
			Member   string `json:"member"`
			PID      int    `json:"pid"`
			Process  string `json:"process"`
			Code     string `json:"code"`
			What     string `json:"what"`
			Cure     string `json:"cure"`
		} `json:"findings"`
		NeededBytes uint64 `json:"needed_bytes"`
		GhostBytes  uint64 `json:"ghost_bytes"`
		Processes   int    `json:"processes"`
		TookNS      int64  `json:"took_ns"`
	}
	checkDocument struct {
		Group   string   `json:"group"`
		Members []string `json:"members"`
		Memory  []struct {
			Member string `json:"member"`
			Engine string `json:"engine"`
			Why    string `json:"why"`
		} `json:"memory"`
		preflightDocument
	}
	restoreDocument struct {
		Group   string `json:"group"`
		Ref     string `json:"ref"`
		Epoch   string `json:"epoch"`
		Members []struct {
			ID    string `json:"id"`
			Name  string `json:"name"`
			PID   int    `json:"pid"`
			Netns string `json:"netns"`
			Image string `json:"image"`
		} `json:"members"`
		TotalMS  float64            `json:"total_ms"`
		PhasesMS map[string]float64 `json:"phases_ms"`
		Warnings []string           `json:"warnings"`
	}
	psDocument []struct {
		Group       string    `json:"group"`
		Member      string    `json:"member"`
		ID          string    `json:"id"`
		State       string    `json:"state"`
		Processes   int       `json:"processes"`
		MemoryBytes uint64    `json:"memory_bytes"`
		Checkpoint  string    `json:"checkpoint"`
		Time        time.Time `json:"checkpoint_time"`
	}
	imagesDocument []struct {
		Ref       string          `json:"ref"`
		CreatedAt time.Time       `json:"created_at"`
		Bytes     int64           `json:"bytes"`
		Increment int64           `json:"increment_bytes"`
		Group     inspectDocument `json:"group"`
	}
	parentDocument struct {
		Epoch  string `json:"epoch"`
		Number int    `json:"number"`
	}
	inspectDocument struct {
		Target  ocispec.Descriptor `json:"target"`
		Group   string             `json:"group"`
		Epoch   string             `json:"epoch"`
		Number  int                `json:"epoch_number"`
		CutAt   time.Time          `json:"cut_at"`
		Stopped *bool              `json:"stopped"`
		Parent  *parentDocument    `json:"parent"`
		Chain   int                `json:"chain"`
		Full    int                `json:"full_epoch_number"`
		Whole   *bool              `json:"whole"`
		Members []struct {
			Name     string             `json:"name"`
			Manifest ocispec.Descriptor `json:"manifest"`
			Config   ocispec.Descriptor `json:"config"`
			Layers   []struct {
				Descriptor ocispec.Descriptor `json:"descriptor"`
				DiffID     string             `json:"diff_id"`
				Kind       string             `json:"kind"`
				Epoch      int                `json:"epoch_number"`
			} `json:"layers"`
			Annotations map[string]string `json:"annotations"`
			ChainID     string            `json:"chain_id"`
			Parent      *parentDocument   `json:"parent"`
			Chain       int               `json:"chain"`
			Bytes       int64             `json:"bytes"`
			Increment   int64             `json:"increment_bytes"`
			Checkpoint  *oci.Checkpoint   `json:"checkpoint"`
		} `json:"members"`
	}
	prunedDocument struct {
		Epoch  string    `json:"epoch"`
		Number int       `json:"epoch_number"`
		CutAt  time.Time `json:"cut_at"`
		Names  []string  `json:"names"`
		UsedBy []string  `json:"used_by"`
	}
	pruneDocument struct {
		DryRun *bool `json:"dry_run"`
		Groups []struct {
			Group   string           `json:"group"`
			Kept    []prunedDocument `json:"kept"`
			Removed []prunedDocument `json:"removed"`
		} `json:"groups"`
	}
	mergeDocument struct {
		Group   string  `json:"group"`
		Ref     string  `json:"ref"`
		Epoch   string  `json:"epoch"`
		Number  int     `json:"epoch_number"`
		Digest  string  `json:"digest"`
		TotalMS float64 `json:"total_ms"`
		Members []struct {
			Name        string `json:"name"`
			Image       string `json:"image"`
			Digest      string `json:"digest"`
			Chain       int    `json:"chain"`
			Bytes       int64  `json:"bytes"`
			BytesBefore int64  `json:"bytes_before"`
		} `json:"members"`
	}
)

// strict decodes a document that must have no member that the type lacks.
func strict(t *testing.T, out string, into any) {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(out))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		t.Errorf("%v in\n%s", err, out)
	}
	if d.More() {
		t.Errorf("more than one document:\n%s", out)
	}
}

// documented expects every member of a document to be named in a section of docs/cli.md.
func documented(t *testing.T, section, out string, free ...string) {
	t.Helper()
	doc, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	begin := regexp.MustCompile(`\n## cohort ` + section + `\b`).FindIndex(doc)
	if begin == nil {
		t.Fatalf("docs/cli.md has no section on cohort %s", section)
	}
	text, _, _ := bytes.Cut(doc[begin[1]:], []byte("\n## "))
	var v any
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	collect(v, names, free)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if !regexp.MustCompile(`\b` + regexp.QuoteMeta(name) + `\b`).Match(text) {
			t.Errorf("docs/cli.md does not document %q of cohort %s --json", name, section)
		}
	}
}

// collect gathers the names of a document's members, but not below those that are free.
func collect(v any, names map[string]bool, free []string) {
	switch v := v.(type) {
	case []any:
		for _, x := range v {
			collect(x, names, free)
		}
	case map[string]any:
		for name, x := range v {
			names[name] = true
			if !slices.Contains(free, name) {
				collect(x, names, free)
			}
		}
	}
}

func TestJSONIsWhatTheDocumentationSays(t *testing.T) {
	w := setUp(t)
	g := w.tickers(2)
	ref := w.image("schema")
	run := func(section string, into any, free []string, args ...string) {
		t.Helper()
		out := w.cohort(append([]string{section, "--json"}, args...)...)
		strict(t, out, into)
		documented(t, section, out, free...)
	}
	var check checkDocument
	run("check", &check, nil, g.name)
	if check.Group != g.name || !slices.Equal(check.Members, g.ids) || check.Processes != 2 || check.NeededBytes == 0 || check.Findings == nil {
		t.Errorf("cohort check: %+v", check)
	}
	var c checkpointDocument
	run("checkpoint", &c, []string{"preflight", "parts_ms", "memory"}, g.name, ref)
	if c.Group != g.name || c.Ref != ref || len(c.Epoch) != 32 || c.Number != 1 || !strings.HasPrefix(c.Digest, "sha256:") || c.StopMS == nil || *c.StopMS <= 0 || c.SkewMS == nil {
		t.Errorf("cohort checkpoint: %+v", c)
	}
	if got := slices.Sorted(maps.Keys(c.PhasesMS)); !slices.Equal(got, slices.Sorted(slices.Values(shop.Phases))) {
		t.Errorf("cohort checkpoint has the phases %v", got)
	}
	for i, m := range c.Members {
		if m.ID != g.ids[i] || m.Name != g.members[i] || m.StopMS == nil || *m.StopMS > *c.StopMS || m.Processes == nil || *m.Processes != 1 ||
			m.MemoryBytes == nil || *m.MemoryBytes < 4<<20 || m.StorageBytes == nil || *m.StorageBytes == 0 ||
			m.Image != ref+"-"+m.Name || !strings.HasPrefix(m.Digest, "sha256:") || m.PartsMS["criu"] <= 0 {
			t.Errorf("cohort checkpoint has the member %+v", m)
		}
	}
	var ps psDocument
	run("ps", &ps, nil)
	for i := range g.ids {
		if len(ps) != 2 || ps[i].Group != g.name || ps[i].ID != g.ids[i] || ps[i].Member != g.members[i] || ps[i].State != "running" || ps[i].Checkpoint != ref || ps[i].Time.IsZero() || ps[i].Processes != 1 {
			t.Fatalf("cohort ps: %+v", ps)
		}
	}
	var list imagesDocument
	run("images", &list, []string{"group"})
	if len(list) != 1 || list[0].Ref != ref || list[0].Group.Group != g.name || list[0].Bytes < 4<<20 || len(list[0].Group.Members) != 2 {
		t.Errorf("cohort images: %+v", list)
	}
	var in inspectDocument
	run("inspect", &in, []string{"target", "manifest", "config", "layers", "annotations", "checkpoint"}, ref)
	if in.Group != g.name || in.Epoch != c.Epoch || in.Stopped == nil || *in.Stopped || in.Whole == nil || !*in.Whole || len(in.Members) != 2 || in.Target.Digest.String() != c.Digest {
		t.Errorf("cohort inspect: %+v", in)
	}
	for i, m := range in.Members {
		ck := m.Checkpoint
		if ck == nil || ck.ContainerID != g.ids[i] || m.Manifest.Digest.String() != c.Members[i].Digest || len(m.Layers) < 3 || len(ck.Processes) != 1 || ck.Processes[0].Comm != "ticker" {
			t.Errorf("cohort inspect has the member %+v", m)
		}
	}
	next := w.image("schema-next")
	c = checkpointDocument{}
	run("checkpoint", &c, []string{"preflight", "parts_ms", "memory"}, g.name, next)
	for _, m := range c.Members {
		if m.Chain != 2 || m.ParentEpoch != in.Epoch || m.Increment <= 0 || m.Increment >= m.Bytes {
			t.Errorf("cohort checkpoint has the member %+v, an increment", m)
		}
	}
	in = inspectDocument{}
	run("inspect", &in, []string{"target", "manifest", "config", "descriptor", "annotations", "checkpoint"}, next)
	if in.Chain != 2 || in.Full != 1 || in.Parent == nil || in.Parent.Number != 1 || in.Members[0].Chain != 2 || in.Members[0].Parent == nil {
		t.Errorf("cohort inspect of an increment: %+v", in)
	}
	var merged mergeDocument
	run("merge", &merged, nil, next)
	if merged.Ref != next || merged.Number != 2 || merged.Digest == c.Digest || len(merged.Members) != 2 || merged.Members[0].Chain != 2 || merged.TotalMS <= 0 {
		t.Errorf("cohort merge: %+v", merged)
	}
	var pruned pruneDocument
	run("prune", &pruned, nil, "--keep", "1", "--dry-run", g.name)
	if pruned.DryRun == nil || !*pruned.DryRun || len(pruned.Groups) != 1 || len(pruned.Groups[0].Kept) != 1 || len(pruned.Groups[0].Removed) != 1 || len(pruned.Groups[0].Removed[0].Names) != 3 {
		t.Errorf("cohort prune: %+v", pruned)
	}
	c.Epoch = pruned.Groups[0].Removed[0].Epoch
	copies := []string{g.ids[0] + "-s", g.ids[1] + "-s"}
	w.in.RemoveAfter(t, copies...)
	var r restoreDocument
	run("restore", &r, nil, "--id-suffix", "-s", ref)
	if got := slices.Sorted(maps.Keys(r.PhasesMS)); !slices.Equal(got, []string{"create", "network", "read", "release", "restore", "unpack"}) {
		t.Errorf("cohort restore has the phases %v", got)
	}
	if r.Group != g.name || r.Ref != ref || r.Epoch != c.Epoch || len(r.Members) != 2 || r.TotalMS <= 0 || r.Warnings == nil {
		t.Errorf("cohort restore: %+v", r)
	}
	for i, m := range r.Members {
		if m.ID != copies[i] || m.Name != g.members[i] || m.PID != w.pid(m.ID) || m.Image != ref+"-"+m.Name || m.Netns == "" {
			t.Errorf("cohort restore has the member %+v", m)
		}
	}
}

// What people read holds the same facts.
func TestTablesShowWhatTheDocumentsHold(t *testing.T) {
	w := setUp(t)
	g := w.tickers(2)
	ref := w.image("tables")
	shows := func(args []string, words ...string) {
		t.Helper()
		out := w.cohort(args...)
		for _, word := range words {
			if !strings.Contains(out, word) {
				t.Errorf("cohort %s does not show %q:\n%s", strings.Join(args, " "), word, out)
			}
		}
	}
	shows([]string{"check", g.name}, "2 members can be checkpointed")
	shows([]string{"checkpoint", g.name, ref}, ref, "2 members", "stopped for", "MEMBER", ref+"-a", ref+"-b")
	shows([]string{"ps"}, "GROUP", g.name, g.ids[0], g.ids[1], "running", ref)
	shows([]string{"images"}, "REF", ref, g.name)
	shows([]string{"inspect", ref}, g.name, "epoch 1", "├── a", "└── b", g.ids[0], "ticker", "checkpoint", "rw", "base")
	shows([]string{"inspect", ref + "-b"}, "└── b", g.ids[1])
	w.remove(g.ids...)
	shows([]string{"restore", ref}, ref, "2 members running again", g.ids[0], g.ids[1])
	for _, command := range []string{"", "checkpoint", "restore", "ps", "images", "inspect", "check", "prune", "merge", "schedule"} {
		shows([]string{command, "--help"}[btoi(command == ""):], "Usage:", "Examples:", "cohort "+command, "--json", "--address", "--namespace")
	}
	shows([]string{"--version"}, "cohort")
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}
