// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"golang.org/x/term"

	"github.com/cohort-project/cohort/runtime/preflight"
)

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// table prints rows with aligned columns, header first.
func table(w io.Writer, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 8, 3, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(t, strings.Join(r, "\t"))
	}
	return t.Flush()
}

// size in binary units, as people read it.
func size(n uint64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	div, exp := uint64(unit), 0
	for m := n / unit; m >= unit; m /= unit {
		div *= unit
		exp++
	}
	return fmt.Sprintf("%.1f %ciB", float64(n)/float64(div), "KMGTPE"[exp])
}

func printFindings(w io.Writer, r preflight.Report) {
	for _, f := range r.Findings {
		fmt.Fprintf(w, "%s: %s\n", f.Severity, f)
	}
}

// progress shows on a terminal what is going on when it takes over a second.
type progress struct {
	w    io.Writer
	mu   sync.Mutex
	what string
	stop chan struct{}
	done chan struct{}
}

// newProgress returns nil, which does nothing, where w is not a terminal.
func newProgress(w io.Writer) *progress {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return nil
	}
	p := &progress{w: w, stop: make(chan struct{}), done: make(chan struct{})}
	go p.run()
	return p
}

func (p *progress) run() {
	defer close(p.done)
	start := time.Now()
	t := time.NewTicker(200 * time.Millisecond)
	defer t.Stop()
	shown := false
	for {
		select {
		case <-t.C:
			if since := time.Since(start); since > time.Second {
				p.mu.Lock()
				what := p.what
				p.mu.Unlock()
				fmt.Fprintf(p.w, "\r\033[K%s %.0fs", what, since.Seconds())
				shown = true
			}
		case <-p.stop:
			if shown {
				fmt.Fprint(p.w, "\r\033[K")
			}
			return
		}
	}
}

// Step names what is going on; the empty name is ignored.
func (p *progress) Step(what string) {
	if p == nil || what == "" {
		return
	}
	p.mu.Lock()
	p.what = what
	p.mu.Unlock()
}

// Close wipes the line.
func (p *progress) Close() {
	if p != nil {
		close(p.stop)
		<-p.done
	}
}
