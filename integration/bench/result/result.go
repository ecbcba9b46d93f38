// SPDX-License-Identifier: Apache-2.0

package result

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// The systems that are compared.
const (
	Containerd = "containerd"
	CRIU       = "criu"
	Cohort     = "cohort"
	// CohortOverlay is cohort's shim on containerd's overlayfs.
	CohortOverlay = "cohort-shim-overlayfs"
)

// Row is one system in one case. Times are milliseconds and medians unless the
// name says otherwise; what was not measured is null, or left out.
type Row struct {
	Case   string `json:"case"`
	System string `json:"system"`
	// The stop as the members felt it: of each checkpoint the longest gap of any
	// member's ticker.
	StopP50    *float64 `json:"stop_ms_p50"`
	StopMax    *float64 `json:"stop_ms_max"`
	Total      *float64 `json:"total_ms"`
	Restore    *float64 `json:"restore_ms"`
	ImageBytes *int64   `json:"image_bytes"`

	// RunP50 is the time of `ctr run --rm` of a program that ends at once.
	RunP50 *float64 `json:"run_ms_p50,omitempty"`

	Members   int `json:"members,omitempty"`
	MemoryMiB int `json:"memory_mib,omitempty"`
	// DirtyPercent is how much of its memory each member dirties a second.
	DirtyPercent float64 `json:"dirty_percent_s,omitempty"`

	// Repeats is the number of checkpoints measured, Failures of those that were
	// not; Error is the last one's.
	Repeats  int    `json:"repeats"`
	Failures int    `json:"failures"`
	Error    string `json:"error,omitempty"`
	// Skipped says why the case was not run at all.
	Skipped string `json:"skipped,omitempty"`

	Stops []float64 `json:"stops_ms,omitempty"`
	// IdleGapMax is the longest gap while nothing was being checkpointed: below
	// this, a stop cannot be told from the machine's own noise.
	IdleGapMax *float64 `json:"idle_gap_ms_max,omitempty"`

	// What cohort reports of itself.
	StopReportedP50 *float64           `json:"stop_reported_ms_p50,omitempty"`
	SkewMax         *float64           `json:"skew_ms_max,omitempty"`
	Phases          map[string]float64 `json:"phases_ms,omitempty"`
	Parts           map[string]float64 `json:"parts_ms,omitempty"`
	Export          *float64           `json:"export_ms,omitempty"`
	// SealMiBs is the memory over the time of the phase seal; DurableMiBs over all
	// phases until the memory is durable, prepare to seal.
	SealMiBs     *float64 `json:"seal_mib_s,omitempty"`
	DurableMiBs  *float64 `json:"durable_mib_s,omitempty"`
	BarrierBytes *float64 `json:"barrier_bytes,omitempty"`
	Engine       string   `json:"engine,omitempty"`
	// Sample is the checkpoint whose stop is nearest to the median.
	Sample *Report `json:"sample,omitempty"`

	// ImageShare is the image's size as a percentage of the full checkpoint's.
	ImageShare *float64 `json:"image_share_percent,omitempty"`
	// Increment is how it was found what did not change: tracking or content; FullWhy
	// says why a checkpoint that could have been an increment is not. Chain is of how
	// many epochs the checkpoint consists, Merge how long it took to make a chain that
	// had grown too long a full checkpoint (within Total).
	Increment string   `json:"increment,omitempty"`
	FullWhy   string   `json:"full_why,omitempty"`
	Chain     int      `json:"chain,omitempty"`
	Merge     *float64 `json:"merge_ms,omitempty"`
	// Load on an application: transactions a second before, over and after the
	// checkpoint, how many percent fewer over it than around it, and the
	// longest time without an answer to any client over it.
	RateBefore *float64 `json:"rate_before,omitempty"`
	RateDuring *float64 `json:"rate_during,omitempty"`
	RateAfter  *float64 `json:"rate_after,omitempty"`
	SlowDown   *float64 `json:"slow_down_percent,omitempty"`
	ClientGap  *float64 `json:"client_gap_ms_p50,omitempty"`
}

// Report is the part of what `cohort checkpoint --json` prints that the benchmark
// uses; docs/cli.md describes it.
type Report struct {
	StopMS   float64            `json:"stop_ms"`
	SkewMS   float64            `json:"skew_ms"`
	PhasesMS map[string]float64 `json:"phases_ms"`
	Members  []ReportMember     `json:"members"`
	Merge    *struct {
		TotalMS float64 `json:"total_ms"`
	} `json:"merge,omitempty"`
	MergeError string `json:"merge_error,omitempty"`
}

// ReportMember is one member's part of a Report.
type ReportMember struct {
	Name    string             `json:"name"`
	StopMS  float64            `json:"stop_ms"`
	PartsMS map[string]float64 `json:"parts_ms"`
	Chain   int                `json:"chain,omitempty"`
	Memory  struct {
		Engine         string `json:"engine"`
		Rounds         int    `json:"rounds"`
		End            string `json:"end,omitempty"`
		CopiedBytes    uint64 `json:"copied_bytes"`
		BarrierBytes   uint64 `json:"barrier_bytes"`
		PrecopiedBytes uint64 `json:"precopied_bytes"`
		Increment      string `json:"increment,omitempty"`
		FullWhy        string `json:"full_why,omitempty"`
	} `json:"memory"`
}

// Phases is the order of a checkpoint's phases.
var Phases = []string{"prepare", "close", "freeze", "capture", "release", "seal", "export"}

// Header describes the machine and the run.
type Header struct {
	Time     time.Time         `json:"time"`
	Kernel   string            `json:"kernel"`
	Arch     string            `json:"arch"`
	CPU      string            `json:"cpu"`
	Cores    int               `json:"cores"`
	Memory   uint64            `json:"memory_bytes"`
	Load     string            `json:"load"`
	Disk     string            `json:"disk"`
	Cgroups  string            `json:"cgroups"`
	Versions map[string]string `json:"versions"`
	// TookSeconds is how long the whole run took.
	TookSeconds float64 `json:"took_s"`
}

func (h Header) String() string {
	return fmt.Sprintf("%s, %d cores, %.0f GiB, Linux %s, %s; load average at the start %s",
		h.CPU, h.Cores, float64(h.Memory)/(1<<30), h.Kernel, h.Disk, h.Load)
}

// File is one run: lines of JSON, the header and then the rows.
type File struct {
	Header Header
	Rows   []Row
}

// Find returns the row of a system in a case, nil if there is none.
func (f *File) Find(name, system string) *Row {
	for i := range f.Rows {
		if f.Rows[i].Case == name && f.Rows[i].System == system {
			return &f.Rows[i]
		}
	}
	return nil
}

// Replace takes the cases of another run for those of this one, and its machine if
// this one has none yet. Cases that this one lacks come last.
func (f *File) Replace(more *File) {
	if f.Header.Time.IsZero() {
		f.Header = more.Header
		f.Header.TookSeconds = 0
	}
	f.Header.TookSeconds += more.Header.TookSeconds
	have := map[string][]Row{}
	for _, r := range more.Rows {
		have[r.Case] = append(have[r.Case], r)
	}
	var rows []Row
	for _, r := range f.Rows {
		if list, ok := have[r.Case]; !ok {
			rows = append(rows, r)
		} else if list != nil {
			rows = append(rows, list...)
			have[r.Case] = nil
		}
	}
	for _, r := range more.Rows {
		if have[r.Case] != nil {
			rows = append(rows, r)
		}
	}
	f.Rows = rows
}

// Write writes the file in one piece.
func (f *File) Write(path string) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	if err := e.Encode(map[string]any{"header": f.Header}); err != nil {
		return err
	}
	for _, r := range f.Rows {
		if err := e.Encode(r); err != nil {
			return err
		}
	}
	return os.WriteFile(path, b.Bytes(), 0o644)
}

var errHeader = errors.New("no header")

// Read reads what Write wrote.
func Read(path string) (*File, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	var first struct {
		Header *Header `json:"header"`
	}
	if err := d.Decode(&first); err != nil || first.Header == nil {
		return nil, fmt.Errorf("%s does not begin with the header of a benchmark's results; make bench writes such a file: %w", path, errors.Join(err, errHeader))
	}
	f := &File{Header: *first.Header}
	for {
		var r Row
		if err := d.Decode(&r); err == io.EOF {
			return f, nil
		} else if err != nil {
			return nil, fmt.Errorf("%s, row %d: %w", path, len(f.Rows)+1, err)
		}
		f.Rows = append(f.Rows, r)
	}
}
