// SPDX-License-Identifier: Apache-2.0

// Shopload loads a shop from outside its group, logs every answer, and prints
// a summary as one JSON object when it ends: after --duration, or in order
// upon SIGTERM or SIGINT.
//
//	shopload --addr 10.213.7.2:8080 --workers 8 --rate 400 --log orders.jsonl
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/cohort-project/cohort/integration/shop"
	"github.com/cohort-project/cohort/integration/shop/load"
)

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "the shop's `host:port`")
	workers := flag.Int("workers", 8, "orders under way at a time")
	rate := flag.Float64("rate", 0, "orders a second of all workers, 0 for as many as there can be")
	duration := flag.Duration("duration", 0, "how long, 0 until a signal")
	timeout := flag.Duration("timeout", 10*time.Second, "for one order")
	grace := flag.Duration("grace", 5*time.Second, "for orders under way when told to end")
	log := flag.String("log", "orders.jsonl", "`file` that every answer is appended to")
	flag.Parse()
	if flag.NArg() > 0 || *workers < 1 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(*duration, *log, load.Options{
		Addr: *addr, Workers: *workers, Rate: *rate, Timeout: *timeout, Grace: *grace,
	}); err != nil {
		fmt.Fprintln(os.Stderr, "shopload:", err)
		os.Exit(1)
	}
}

func run(duration time.Duration, log string, o load.Options) error {
	f, err := os.OpenFile(log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	o.Log = shop.NewLogWriter(f)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, duration)
		defer cancel()
	}
	summary, err := load.Run(ctx, o)
	if err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	out.SetIndent("", "  ")
	return out.Encode(summary)
}
