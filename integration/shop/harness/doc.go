// SPDX-License-Identifier: Apache-2.0

// Package harness runs a shop in containers the way a user would: with the
// stock ctr, the cohort command, and network namespaces made for it. The demo
// and the integration tests are written on top of it.
//
// Nothing here knows a package of cohort's: what the harness does, a shell
// script could do. Everything that it makes has an undo (Close, Destroy,
// Stop), every wait ends with its context, and network traffic stays in the
// namespaces that NewNet makes.
//
//	net, _ := harness.NewNet("shop")
//	s, _ := harness.StartShop(ctx, harness.Options{Ctr: harness.CtrFromEnv(), Group: "shop", Net: net})
//	load := s.StartLoad(harness.LoadOptions{Workers: 8, Rate: 400, Log: path})
//	cut, _ := harness.CohortFromEnv().Checkpoint(ctx, "shop", "demo.local/shop:1")
//	summary, log, _ := load.Stop(ctx)
//	s.Destroy(ctx)
package harness
