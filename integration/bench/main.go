// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cohort-project/cohort/integration/bench/picture"
	"github.com/cohort-project/cohort/integration/bench/result"
	"github.com/cohort-project/cohort/integration/harness"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	from := flag.String("draw", "", "draw the pictures from these `files` of results, separated by commas, and measure nothing")
	into := flag.String("into", "docs", "`folder` for the pictures")
	page := flag.String("page", "docs/bench.md", "`file` whose tables are written with the pictures")
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	err := func() error {
		if *from != "" {
			return draw(strings.Split(*from, ","), *into, *page)
		}
		return run(ctx)
	}()
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

// draw writes what can be drawn of the results; a picture whose cases were not
// measured stays as it is. Cases of a later file take the place of those of an
// earlier one, so that some can be measured again.
func draw(from []string, into, page string) error {
	f := &result.File{}
	for _, path := range from {
		more, err := result.Read(path)
		if err != nil {
			return err
		}
		f.Replace(more)
	}
	for name, paint := range map[string]func(*result.File) ([]byte, error){
		"bench-stop.svg": picture.Stop, "bench-phases.svg": picture.Phases,
	} {
		svg, err := paint(f)
		if errors.Is(err, picture.ErrNothing) {
			fmt.Fprintf(os.Stderr, "%s is left as it is: %v\n", name, err)
			continue
		}
		if err != nil {
			return fmt.Errorf("drawing %s: %w", name, err)
		}
		if err := os.WriteFile(filepath.Join(into, name), svg, 0o644); err != nil {
			return err
		}
	}
	old, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	text, err := f.Insert(string(old))
	if err != nil {
		return fmt.Errorf("%s: %w", page, err)
	}
	return os.WriteFile(page, []byte(text), 0o644)
}

func run(ctx context.Context) (err error) {
	p, err := planFromEnv()
	if err != nil {
		return err
	}
	chosen, err := regexp.Compile(os.Getenv("BENCH_CASES"))
	if err != nil {
		return fmt.Errorf("BENCH_CASES: %w", err)
	}
	if os.Geteuid() != 0 {
		return errors.New("the benchmark makes containers: run it as root")
	}
	in, err := harness.Shared()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	b := &bench{in: in, plan: p}
	if err := b.prepare(ctx); err != nil {
		return err
	}
	f := &result.File{Header: facts(ctx, in)}
	begin := time.Now()
	failed := 0
	for _, c := range cases() {
		if !chosen.MatchString(c.name()) || p.tooLarge(c) {
			continue
		}
		rows := c.run(ctx, b)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		for _, r := range rows {
			failed += r.Failures
		}
		f.Rows = append(f.Rows, rows...)
		if err := b.clean(ctx); err != nil {
			failed++
			fmt.Fprintf(os.Stderr, "%s left behind: %v\n", c.name(), err)
		}
		// Whatever ends the run early, what has been measured is there.
		f.Header.TookSeconds = time.Since(begin).Seconds()
		if path := os.Getenv("BENCH_OUT"); path != "" {
			if err := f.Write(path); err != nil {
				return err
			}
		}
	}
	if err := f.Print(os.Stdout); err != nil {
		return err
	}
	fmt.Printf("\n%s; took %v\n", f.Header, time.Since(begin).Round(time.Second))
	if failed > 0 {
		return fmt.Errorf("%d measurements failed, see above", failed)
	}
	return nil
}

// leakLimit is how long what a checkpoint used may take to go away by itself.
const leakLimit = 15 * time.Second

// clean tells what a case has left behind.
func (b *bench) clean(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, leakLimit)
	defer cancel()
	for {
		err := b.in.Leaks()
		if err == nil || pause(ctx, 100*time.Millisecond) != nil {
			return err
		}
	}
}

// plan is how much is measured.
type plan struct {
	// n is how often cohort is measured in the cases that targets are about.
	n     int
	quick bool
	// minutes is how long the whole run may take, about.
	minutes float64
}

// fullN is the n for which cases.go gives its numbers.
const fullN = 20

// defaultMinutes is the time for which cases.go gives its limits.
const defaultMinutes = 25

// quickMiB is the most memory of a case that a quick run measures.
const quickMiB = 1024

func planFromEnv() (plan, error) {
	p := plan{n: fullN, minutes: defaultMinutes}
	switch v := os.Getenv("BENCH_QUICK"); v {
	case "", "0":
	case "1":
		p.quick, p.n = true, 2
	default:
		return p, fmt.Errorf("BENCH_QUICK=%q: give 1 or 0", v)
	}
	if v := os.Getenv("BENCH_N"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 {
			return p, fmt.Errorf("BENCH_N=%q: give a positive number", v)
		}
		p.n = n
	}
	if v := os.Getenv("BENCH_MINUTES"); v != "" {
		m, err := strconv.ParseFloat(v, 64)
		if err != nil || m <= 0 || m > 24*60 {
			return p, fmt.Errorf("BENCH_MINUTES=%q: give a positive number", v)
		}
		p.minutes = m
	}
	return p, nil
}

// limit scales a case's limit of cases.go.
func (p plan) limit(full time.Duration) time.Duration {
	return time.Duration(float64(full) * p.minutes / defaultMinutes)
}

// times scales a number of cases.go; nothing that is measured at all is measured
// less than once.
func (p plan) times(full int) int {
	if full == 0 {
		return 0
	}
	return max(1, (full*p.n+fullN/2)/fullN)
}

func (p plan) tooLarge(c benchCase) bool { return p.quick && c.memoryMiB() > quickMiB }

// progress tells on standard error what is going on.
func progress(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// skip is the row of a case that cannot be run, and why.
func skip(name, system, why string) result.Row {
	progress("%s: skipped: %s", name, why)
	return result.Row{Case: name, System: system, Skipped: why}
}
