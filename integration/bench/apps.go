// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/cohort-project/cohort/integration/bench/result"
	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/shop"
	shopharness "github.com/cohort-project/cohort/integration/shop/harness"
)

// ticker runs a member beside an application's that does nothing but tick: the
// whole group stands still together, and this member can say for how long.
func (b *bench) ticker(ctx context.Context, g *members, s *system, net *shopharness.Net) error {
	id := g.group + "-ticker"
	g.ids, g.ticking = append(g.ids, id), []string{id}
	err := b.in.CtrOf(s.runtime).Run(ctx, harness.Container{
		ID: id, Image: harness.ToolsImage,
		Args:        []string{"/bin/memload", "--mem", "1", "--dirty", "0", "--report", reportPath},
		Annotations: []string{"io.cohort.group=" + g.group, "io.cohort.member=ticker"},
		NetNS:       net.GroupPath(),
	})
	if err != nil {
		return err
	}
	return b.ready(ctx, g)
}

// shopCase is the shop under load. Only cohort can take it: neither ctr nor
// containerd has a way to ask CRIU for established connections.
type shopCase struct {
	checkpoints int
	limit       time.Duration
}

// Load of the shop: orders a second, and how many clients place them.
const (
	shopRate    = 400
	shopWorkers = 8
)

func (shopCase) name() string   { return result.ShopCase }
func (shopCase) memoryMiB() int { return quickMiB }

func (c shopCase) run(ctx context.Context, b *bench) []result.Row {
	list := b.turnsOf(times{cohort: c.checkpoints}, mostRestores)
	var gaps []float64
	rotate(ctx, c.name(), b.plan.limit(c.limit), list, func(t *turns, n int) error {
		more, err := c.turn(ctx, b, t, n)
		gaps = append(gaps, more...)
		return err
	})
	r := list[0].found.row(workload{title: c.name(), members: 4}, result.Cohort)
	r.ClientGap = result.Median(gaps)
	return []result.Row{r}
}

// turn starts a shop, takes n checkpoints of it under load and restores the last.
// It returns for each the longest time without an answer to any client.
func (c shopCase) turn(ctx context.Context, b *bench, t *turns, n int) (gaps []float64, err error) {
	g, err := b.newMembers(0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.gone(ctx, g)) }()
	g.flags = b.whole()
	net, err := shopharness.NewNet("bench")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, net.Close()) }()
	starting, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	s, err := shopharness.StartShop(starting, shopharness.Options{Ctr: b.in.CtrOf(t.s.runtime), Group: g.group, Net: net})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.Destroy(context.WithoutCancel(ctx))) }()
	if err := b.ticker(starting, g, t.s, net); err != nil {
		return nil, err
	}
	load, err := s.StartLoad(shopharness.LoadOptions{Workers: shopWorkers, Rate: shopRate, Log: filepath.Join(g.dir, "load")})
	if err != nil {
		return nil, err
	}
	defer func() { _, _, _ = load.Stop() }() // what it says is taken below
	if err := load.WaitAcked(starting, shopRate); err != nil {
		return nil, err
	}
	var windows []window
	for i := range n {
		if i > 0 {
			if err := t.s.drop(b, ctx, g); err != nil {
				return nil, err
			}
		}
		w, err := b.once(ctx, t, g, settled)
		if err != nil {
			return nil, fmt.Errorf("checkpoint %d of %d: %w", i+1, n, err)
		}
		windows = append(windows, w)
	}
	if err := pause(ctx, settled); err != nil {
		return nil, err
	}
	felt, log, err := load.Stop()
	if err != nil {
		return nil, err
	}
	if failed := felt.ConnErrors + felt.Refused + felt.Timeouts; failed > 0 {
		return nil, fmt.Errorf("%d of the shop's orders failed: %s", failed, felt.LastError)
	}
	answers := each(log.Acks, func(a shop.Ack) time.Time { return a.Acked })
	for _, w := range windows {
		gaps = append(gaps, longestSilence(answers, w))
	}
	if t.restores == 0 {
		return gaps, nil
	}
	t.restores--
	if err := errors.Join(s.Destroy(ctx), b.remove(ctx, g), net.CloseGroup()); err != nil {
		return gaps, err
	}
	took, err := b.bringBack(ctx, t.s, g)
	if err != nil {
		return gaps, fmt.Errorf("restore: %w", err)
	}
	t.found.restores = append(t.found.restores, took)
	back, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	_, err = s.Restored(back, "")
	return gaps, err
}

// longestSilence is the longest time, in milliseconds, between two answers that lie
// in a window or reach into it.
func longestSilence(answers []time.Time, w window) float64 {
	slices.SortFunc(answers, time.Time.Compare)
	var longest time.Duration
	for i := range len(answers) - 1 {
		if a, b := answers[i], answers[i+1]; b.After(w.from) && a.Before(w.to) {
			longest = max(longest, b.Sub(a))
		}
	}
	return float64(longest) / 1e6
}
