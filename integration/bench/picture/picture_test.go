// SPDX-License-Identifier: Apache-2.0

package picture

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/cohort-project/cohort/integration/bench/result"
)

// example has names and values that want care: markup, nothing, zeros.
func example() *result.File {
	f := &result.File{Header: result.Header{CPU: `A & B <"fast">`, Cores: 2, Kernel: "6.18"}}
	for i, mib := range result.Sizes {
		for k, system := range []string{result.Containerd, result.CRIU, result.Cohort} {
			p50 := float64((i+1)*1000) / float64(1+100*k)
			f.Rows = append(f.Rows, result.Row{Case: result.ProcessCase(mib, 1), System: system, StopP50: &p50})
		}
	}
	f.Rows[0].StopP50 = nil
	f.Rows = append(f.Rows, result.Row{
		Case: result.GroupCase(2, 256), System: result.Cohort, Members: 2, MemoryMiB: 256,
		Sample: &result.Report{
			StopMS: 20, PhasesMS: map[string]float64{"prepare": 900, "freeze": 2, "capture": 20, "release": 0, "export": 1000},
			Members: []result.ReportMember{{Name: `<a & "b" with a long name>`, StopMS: 19, PartsMS: map[string]float64{"scan": 1, "criu": 15}}, {Name: "c"}},
		},
	})
	return f
}

func TestPicturesAreWellFormed(t *testing.T) {
	for name, draw := range map[string]func(*result.File) ([]byte, error){"stop": Stop, "phases": Phases} {
		svg, err := draw(example())
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if bytes.Contains(svg, []byte("NaN")) || bytes.Contains(svg, []byte("Inf")) {
			t.Errorf("%s has a length that is no number", name)
		}
		d := xml.NewDecoder(bytes.NewReader(svg))
		texts := ""
		for {
			token, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s is not well-formed: %v", name, err)
			}
			if text, ok := token.(xml.CharData); ok {
				texts += string(text)
			}
		}
		if !strings.Contains(texts, `A & B <"fast">`) {
			t.Errorf("%s does not name the machine", name)
		}
	}
}

func TestWhatWasNotMeasuredIsNotDrawn(t *testing.T) {
	empty := &result.File{Rows: []result.Row{{Case: result.RunCase, System: result.Cohort}}}
	for name, draw := range map[string]func(*result.File) ([]byte, error){"stop": Stop, "phases": Phases} {
		if _, err := draw(empty); !errors.Is(err, ErrNothing) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
